"""Which weights train, what the backward pass recomputes, and how one model also serves as its own reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from vce_ray.config import TrainConfig
from vce_ray.models.adapter import add_lora
from vce_ray.models.base import ImageModel


def make_trainable(net: Any, config: TrainConfig) -> None:
    """Freeze everything but what trains: a fresh LoRA, or the decoder layers and the image head."""
    if config.weights == "lora":
        add_lora(net, config.lora_rank, config.lora_alpha)
        return
    net.requires_grad_(False)
    net.model.language_model.layers.requires_grad_(True)
    net.model.generation_head.requires_grad_(True)


def recompute_layers(net: Any) -> None:
    """Keep only each decoder layer's input and recompute the rest in the backward pass.

    Costs a third more arithmetic and saves nine tenths of the activations: without it a dozen pairs of Janus-Pro-7B fit
    on no GPU.
    """
    for layer in net.model.language_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def in_own_dtype(net: Any) -> Iterator[None]:
    """Compute in the net's own dtype: a bfloat16 net multiplies by its float32 adapter in bfloat16.

    Gradients of the adapter stay float32. By default peft casts each layer's input to float32 instead, which moves
    twice the bytes.
    """
    weight = net.model.language_model.embed_tokens.weight
    if weight.dtype == torch.float32:
        yield
        return
    with torch.autocast(weight.device.type, weight.dtype), disable_input_dtype_casting(net):
        yield


@contextmanager
def adapter_off(net: nn.Module) -> Iterator[None]:
    """Compute as the base, with the adapter disabled.

    Sets the layers' own switch: peft's `enable_adapters` would also flip requires_grad, which sharded parameters must
    keep for the whole step.
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
    """Return the context in which `reference` computes as the base: adapter off if it is the trained model itself."""
    if reference is model:
        return lambda: adapter_off(model.net)
    return torch.no_grad
