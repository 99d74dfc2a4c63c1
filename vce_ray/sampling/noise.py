"""Sampling noise that belongs to a sample, not to a batch.

Each number is a hash of (seed of the sample, step, vocabulary entry), so a sample's noise is the same in
whatever batch, order or device it is drawn. The hash is splitmix64's finaliser (Steele, Lea, Flood:
"Fast splittable pseudorandom number generators", 2014) in wrapping 64-bit integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vce_ray.sampling.compiled import step_kernels

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1: at 1 the Gumbel noise would be infinite, and draw an entry whatever its logit is."""


def _signed(value: int) -> int:
    """The value modulo 2^64, as the int64 of the same bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = _signed(GOLDEN), _signed(MIX1), _signed(MIX2)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def uniform_noise(seeds: Tensor, steps: int | Tensor, size: int) -> Tensor:
    """Uniform numbers in (0, 1), float32 [..., size], for a step of each sample.

    Args:
        seeds: int64: one for each sample.
        steps: which image token each of them draws, from 0: an int, or int64, and then both are broadcast together.
        size: how many numbers a sample needs.
    """
    moment = _signed((steps + 1) * _GOLDEN) if isinstance(steps, int) else (steps + 1) * _GOLDEN
    stream = _mix(_mix(seeds * _GOLDEN) + moment)
    counter = torch.arange(1, size + 1, device=seeds.device) * _GOLDEN
    bits = _shift(_mix(stream[..., None] + counter), 40)  # 24 bits: what a float32 holds exactly, but not their halves
    return ((bits.float() + 0.5) / (1 << 24)).clamp(max=BELOW_ONE)


def gumbel_noise(seeds: Tensor, steps: int | Tensor, size: int) -> Tensor:
    """Standard Gumbel noise of uniform_noise's shape: argmax(logits + noise) samples from softmax(logits)."""
    if isinstance(steps, Tensor) and seeds.device.type == "cpu" and (kernels := step_kernels()):
        seeds, steps = torch.broadcast_tensors(seeds, steps)
        return kernels.gumbel(seeds.flatten(), steps.flatten(), size).unflatten(0, seeds.shape)
    return -torch.log(-torch.log(uniform_noise(seeds, steps, size)))
