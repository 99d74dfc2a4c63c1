"""Batch, memory and time of sampling on a device, computed from a model's shape.

A step that draws a token of B images reads all weights once and the used part of every row's cache, and multiplies
each row with every weight. With R = 2B rows under guidance, weight bytes W = N * b (N parameters of b bytes), context
length c, cache bytes K of one token in one row, memory bandwidth BW and arithmetic F, it takes at least

    seconds per step = max(W / BW, 2 N R / F) + R c K / BW      (c: the prompt and half of the image, on average)

What it is expected to take is this limit times a factor, and a constant for each layer's kernels, both fitted to
measured steps (`Overhead`).

Units: bytes, bytes/s, floating-point operations/s, seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vce_ray.devices import RESERVE, Device, check_dtype
from vce_ray.models.shape import BYTES, Shape
from vce_ray.sampling.memory import SLOT_BLOCK, cache_slots, fitting_batch, image_bytes, weight_bytes

USEFUL_SHARE = 0.9
"""A batch is large enough once it reaches this share of the throughput of an arbitrarily large one."""


class Overhead(NamedTuple):
    """How much longer than its limit a step takes."""

    times_limit: float
    layer_s: float
    """Seconds per layer that depend on neither model nor batch: launching kernels, gaps between them."""

    def step_s(self, limit_s: float, layers: int) -> float:
        """Return the seconds that a step is expected to take."""
        return self.times_limit * limit_s + self.layer_s * layers


OVERHEADS = {"sheet": Overhead(1.5, 30e-6), "gpu": Overhead(1.25, 30e-6), "cpu": Overhead(1.7, 240e-6)}
"""Overhead of this project's step, by `Device.kind`. Least squares over the rows of docs/results/decode_gpu.json, all
from one H200, which reached 85% of the bandwidth and 80% of the arithmetic of its data sheet; none is off by more than
15%. For CPUs, the two rows of decode_cpu.json. That other GPUs behave alike is an assumption."""
TEXT_OVERHEADS = {"sheet": Overhead(1.0, 850e-6), "gpu": Overhead(0.85, 850e-6), "cpu": Overhead(3.8, 1.7e-3)}
"""The same of transformers' loop, which writes captions, from the same rows (`times_transformers`)."""


@dataclass(frozen=True)
class Plan:
    """Memory and time of drawing a batch."""

    batch: int
    rows: int
    largest: int
    """The largest batch that fits; 0 if not even one image does."""
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int
    step_s: float
    """The limit, as are `batch_s` and `images_per_s`."""
    batch_s: float
    images_per_s: float
    bound: str
    """What most of a step is spent on at the limit."""
    expected_step_s: float
    expected_batch_s: float

    @property
    def fits(self) -> bool:
        """Whether the device has room for the batch."""
        return self.batch <= self.largest


def plan(shape: Shape, device: Device, batch: int, guided: bool = True) -> Plan:
    """Plan a batch, whether it fits or not.

    Args:
        batch: images drawn at once.
        guided: whether each image has an unconditional row beside its conditional one.

    Raises:
        UserError: the device cannot compute in the dtype of the weights or of the cache.
    """
    check_dtype(
        device,
        shape.dtype,
        f"{shape.name} with its weights",
        "save the model in float16 or float32 and plan it with --dtype, or use one of these",
    )
    check_dtype(device, shape.cache_dtype, "a key-value cache", "use --kv-cache auto")
    rows = batch * (2 if guided else 1)
    parts = step_parts(shape, device, rows, shape.prompt_tokens + (shape.image_tokens - 1) / 2)
    step_s = limit_s(parts)
    expected_step_s = OVERHEADS[device.kind].step_s(step_s, shape.layers)
    weights, block = weight_bytes(shape, device.packs), slot_block(device)
    return Plan(
        batch=batch,
        rows=rows,
        largest=fitting_batch(shape, device.memory, guided, packs=device.packs, slot_block=block),
        weight_bytes=weights,
        cache_bytes=rows * cache_slots(shape, block) * shape.cache_bytes,
        peak_bytes=weights + batch * image_bytes(shape, guided, block),
        step_s=step_s,
        batch_s=shape.image_tokens * step_s,
        images_per_s=batch / (shape.image_tokens * step_s),
        bound=max(parts, key=lambda part: parts[part]),
        expected_step_s=expected_step_s,
        expected_batch_s=shape.image_tokens * expected_step_s,
    )


def step_parts(shape: Shape, device: Device, rows: int, context: float) -> dict[str, float]:
    """Return the seconds that the parts of a step take at least.

    Args:
        context: tokens in each row's cache.
    """
    return {
        "reading the cache": rows * context * shape.cache_bytes / device.bandwidth,
        "reading the weights": shape.step_parameters * BYTES[shape.dtype] / device.bandwidth,
        "matrix products": 2 * shape.step_parameters * rows / device.arithmetic,
    }


def limit_s(parts: Mapping[str, float]) -> float:
    """Return the least seconds of a step: weights are read while products are computed."""
    return max(parts["reading the weights"], parts["matrix products"]) + parts["reading the cache"]


def useful_batch(shape: Shape, device: Device, guided: bool = True) -> int:
    """Return the smallest batch that reaches USEFUL_SHARE of the highest throughput, whether it fits or not."""
    highest = plan(shape, device, 1 << 20, guided).images_per_s
    batch = 1
    while plan(shape, device, batch, guided).images_per_s <= USEFUL_SHARE * highest:
        batch += 1
    return batch


def needed_memory(shape: Shape, guided: bool = True, packs: bool = False, slot_block: int = 1, batch: int = 1) -> float:
    """Return the bytes of memory that a device must have to draw this many images at once."""
    return (weight_bytes(shape, packs) + batch * image_bytes(shape, guided, slot_block)) / (1 - RESERVE)


def slot_block(device: Device) -> int:
    """Return the number of slots by which the cache grows on a device."""
    return 1 if device.kind == "cpu" else SLOT_BLOCK
