"""Which weights are trained, what is kept for the way back, and how workers share weights: sharded (FSDP2), or whole in
each, with averaged gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

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


def recompute_layers(net: Any) -> None:
    """Keeps of each decoder layer only its input, and computes the rest again on the way back.

    A third more arithmetic for a tenth of the memory: without it a dozen pairs of Janus-Pro-7B fit on no GPU.
    """
    for layer in net.model.language_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard(net: Any, workers: int, device: str) -> None:
    """Shards each decoder layer and the image head over the workers; everything else is frozen and stays whole."""
    # it warns of changes in place to what a module returns; nothing here makes any
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device, (workers,))
    # a step has passes of the reference too: CPUs, which have memory to spare, gather a layer for the first pass only
    for part in (*net.model.language_model.layers, net.model.generation_head):
        fully_shard(part, mesh=mesh, reshard_after_forward=device != "cpu")


def average_gradients(trained: Sequence[Tensor], workers: int) -> None:
    """Averages over the workers, in place, what each has of its share of a batch; FSDP does so for what it shards.

    DistributedDataParallel would have to wrap a module whose `forward` is called; here the parts of a net are.
    """
    gradients = [p.grad for p in trained if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / workers).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@contextmanager
def in_own_dtype(net: Any) -> Iterator[None]:
    """A context in which a net of bfloat16 multiplies by its float32 adapter in bfloat16, its gradients still float32.

    peft would cast what goes into each layer to float32 instead, which moves twice the bytes.
    """
    weight = net.model.language_model.embed_tokens.weight
    if weight.dtype == torch.float32:
        yield
        return
    with torch.autocast(weight.device.type, weight.dtype), disable_input_dtype_casting(net):
        yield


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
