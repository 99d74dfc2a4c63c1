"""Which weights are trained, and how they are sharded over workers (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vce_ray.config import TrainConfig
from vce_ray.models.adapter import add_lora
from vce_ray.models.base import ImageModel


def make_trainable(net: Any, config: TrainConfig) -> None:
    """Freezes all but what is trained: a fresh LoRA, or the decoder layers and the image head."""
    if config.weights == "lora":
        add_lora(net, config.lora_rank, config.lora_alpha)
        return
    net.requires_grad_(False)
    net.model.language_model.layers.requires_grad_(True)
    net.model.generation_head.requires_grad_(True)


def shard(net: Any, workers: int, device: str) -> None:
    """Shards each decoder layer and the image head over the workers; everything else is frozen and stays whole."""
    if workers == 1:
        return
    # it warns of changes in place to what a module returns; nothing here makes any
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device, (workers,))
    # a step has several forward passes: CPUs, which have memory to spare, gather a layer for the first of them only
    for part in (*net.model.language_model.layers, net.model.generation_head):
        fully_shard(part, mesh=mesh, reshard_after_forward=device != "cpu")


@contextmanager
def adapter_off(net: nn.Module) -> Iterator[None]:
    """A context in which the net computes as its base.

    It sets the layers' own switch: peft's `enable_adapters` would also flip requires_grad, which sharded
    parameters must keep for the whole step.
    """
    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def reference_context(model: ImageModel, reference: ImageModel) -> Callable[[], AbstractContextManager[None]]:
    """How `reference` is made to compute as the base: its adapter off where it is the trained model itself."""
    if reference is model:
        return lambda: adapter_off(model.net)
    return torch.no_grad
