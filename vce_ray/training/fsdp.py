"""How workers split a model: sharded (FSDP2), or replicated with averaged gradients; and gradient norms of both."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


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
