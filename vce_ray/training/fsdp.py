"""Which weights train, what the backward pass recomputes, and how workers split the model: sharded (FSDP2), or
replicated with averaged gradients."""

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


def shard(net: Any, workers: int, device: str) -> None:
    """Shard each decoder layer and the image head over the workers. The rest is frozen and stays whole."""
    # The warning is about modules that modify FSDP outputs in place; ours do not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device, (workers,))
    # A step also runs the reference, so a layer resharded after its forward pass would be gathered twice. CPUs have
    # memory to spare and keep it gathered; GPUs give the memory back.
    for part in (*net.model.language_model.layers, net.model.generation_head):
        fully_shard(part, mesh=mesh, reshard_after_forward=device != "cpu")


def average_gradients(trained: Sequence[Tensor], workers: int) -> None:
    """Average gradients over the workers, in place. FSDP does it itself for weights that it shards.

    DistributedDataParallel is no substitute: it wraps a module whose `forward` is called, and a step here calls parts
    of the net. One flat all-reduce is also faster than one for each of some hundred LoRA matrices.
    """
    gradients = [p.grad for p in trained if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / workers).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all gradients, sharded ones included."""
    norms = [p.grad.detach().float().norm() for p in parameters if p.grad is not None]
    full = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return torch.stack(full).norm()


def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients, in place, so that their total norm is at most `max_norm`.

    torch's clip_grad_norm_ cannot mix sharded and plain tensors; `norm` is gradient_norm's, which can.
    """
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).item()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)


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
