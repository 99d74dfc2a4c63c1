"""Sampling noise that depends on the sample, not on the batch.

Each number is a hash of (the sample's seed, step, vocabulary entry), so a sample gets the same noise in any batch, in
any order and on any device. The hash is the finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", 2014) in wrapping 64-bit integers.

step.cpp and kernels.py implement the same hash for CPUs and GPUs. tests/sampling/noise_vectors.json holds values that
all three must reproduce: they are part of what makes an image reproducible and must never change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vce_ray.sampling.compiled import step_kernels

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1. At 1 the Gumbel noise would be infinite, and win whatever the logits are."""


def _to_int64(value: int) -> int:
    """Return the int64 with the bits of `value` modulo 2^64."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = _to_int64(GOLDEN), _to_int64(MIX1), _to_int64(MIX2)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right logically: torch's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def uniform_noise(seeds: Tensor, steps: int | Tensor, size: int) -> Tensor:
    """Return uniform numbers in (0, 1) for one step of each sample: float32 [..., size].

    Args:
        seeds: int64, one per sample.
        steps: index of the image token to draw, from 0: an int, or int64 that broadcasts with `seeds`.
        size: numbers per sample.
    """
    offset = _to_int64((steps + 1) * _GOLDEN) if isinstance(steps, int) else (steps + 1) * _GOLDEN
    stream = _mix(_mix(seeds * _GOLDEN) + offset)
    counter = torch.arange(1, size + 1, device=seeds.device) * _GOLDEN
    bits = _shift(_mix(stream[..., None] + counter), 40)  # 24 bits: float32 holds them exactly
    # adding a half keeps 0 out of the range, but rounds up to 1 where all 24 bits are set
    return ((bits.float() + 0.5) / (1 << 24)).clamp(max=BELOW_ONE)


def gumbel_noise(seeds: Tensor, steps: int | Tensor, size: int) -> Tensor:
    """Return standard Gumbel noise, shaped as uniform_noise: argmax(logits + noise) samples from softmax(logits)."""
    if isinstance(steps, Tensor) and seeds.device.type == "cpu" and (kernels := step_kernels()):
        seeds, steps = torch.broadcast_tensors(seeds, steps)
        return kernels.gumbel(seeds.flatten(), steps.flatten(), size).unflatten(0, seeds.shape)
    return -torch.log(-torch.log(uniform_noise(seeds, steps, size)))
