"""Batch, memory and best possible speed of sampling on a device, computed from a model's shape.

A step that draws a token of B images reads all weights once and the used part of every row's cache, and multiplies
each row with every weight. With R = 2B rows under guidance, weight bytes W = N * b (N parameters of b bytes), context
length c, cache bytes K of one token in one row, memory bandwidth BW and arithmetic F:

    seconds per step = max(W / BW, 2 N R / F) + R c K / BW      (c: the prompt and half of the image, on average)

Units: bytes, bytes/s, floating-point operations/s, seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vce_ray.errors import UserError
from vce_ray.models.shape import BYTES, Shape
from vce_ray.sampling.compiled import step_kernels
from vce_ray.sampling.memory import (
    RESERVE,
    SLOT_BLOCK,
    cache_slots,
    fitting_batch,
    free_memory,
    image_bytes,
    weight_bytes,
)

USEFUL_SHARE = 0.9
"""A batch is large enough once it reaches this share of the throughput of an arbitrarily large one."""


def _janus(name: str, layers: int, width: int, heads: int, feed_forward: int) -> Shape:
    """Janus-Pro: 102,400 text tokens (embedding and head), SigLIP-L, aligners, VQ-16 of 72 M parameters."""
    image_table = 16_384 * width
    idle = 2 * 102_400 * width + 305_000_000 + 72_000_000 + image_table + 2 * width * width
    return Shape(name, layers, width, heads, heads, feed_forward, 16_384, 576, width * width + image_table, idle)


SHAPES = {
    shape.name: shape
    for shape in (
        _janus("janus-pro-1b", 24, 2048, 16, 5632),
        _janus("janus-pro-7b", 30, 4096, 32, 11008),
        Shape("llamagen-xl-256", 36, 1280, 20, 20, 3584, 16_384, 256, 16_384 * 1280, 1_320_000_000, 120),
        Shape("llamagen-xl-512", 36, 1280, 20, 20, 3584, 16_384, 1024, 16_384 * 1280, 1_320_000_000, 120),
    )
}
"""Released models that can be planned for by name. Janus-Pro's feed-forward widths are those of DeepSeek-LLM."""


@dataclass(frozen=True)
class Device:
    """Limits of a device, from its data sheet or measured."""

    name: str
    memory: float
    bandwidth: float
    arithmetic: float
    """Speed of dense matrix products in the dtype of the weights."""
    packs: bool = False
    """Whether float32 matrices read by a step are held a second time, in the layout of the compiled step."""
    slot_block: int = 1
    """The cache is allocated in blocks of this many slots."""


def _gpu(name: str, memory: float, bandwidth: float, arithmetic: float) -> Device:
    return Device(name, memory, bandwidth, arithmetic, slot_block=SLOT_BLOCK)


DEVICES = {
    device.name: device
    for device in (
        _gpu("h200", 141e9, 4.8e12, 989e12),
        _gpu("h100", 80e9, 3.35e12, 989e12),
        _gpu("a100-80gb", 80e9, 2.04e12, 312e12),
        _gpu("a100-40gb", 40e9, 1.56e12, 312e12),
        _gpu("l40s", 48e9, 0.864e12, 362e12),
        _gpu("rtx4090", 24e9, 1.01e12, 165e12),
    )
}
"""Devices that can be planned for by name, with the figures of their data sheets."""


@dataclass(frozen=True)
class Plan:
    """Memory and best possible time of drawing a batch."""

    batch: int
    rows: int
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int
    step_s: float
    batch_s: float
    images_per_s: float
    bound: str
    """What most of a step is spent on."""


def plan(shape: Shape, device: Device, batch: int | None = None, guided: bool = True) -> Plan:
    """Plan a batch.

    Args:
        batch: images drawn at once. By default the smallest batch that reaches USEFUL_SHARE of the throughput of an
            arbitrarily large one, or the largest that fits, if that is smaller.
        guided: whether each image has an unconditional row beside its conditional one.

    Raises:
        UserError: `batch` is None and not even one image fits.
    """
    if batch is None:
        largest = fitting_batch(shape, device.memory, guided, packs=device.packs, slot_block=device.slot_block)
        if largest < 1:
            needed = needed_memory(shape, guided, device.packs, device.slot_block)
            raise UserError(f"{shape.name} needs {needed / 1e9:.1f} GB for one image, {device.name} has less")
        limit = _plan_batch(shape, device, 1 << 20, guided).images_per_s
        useful = (
            size
            for size in range(1, largest)
            if _plan_batch(shape, device, size, guided).images_per_s > USEFUL_SHARE * limit
        )
        batch = next(useful, largest)
    return _plan_batch(shape, device, batch, guided)


def needed_memory(shape: Shape, guided: bool = True, packs: bool = False, slot_block: int = 1) -> float:
    """Return the bytes of memory that a device must have to draw one image."""
    return (weight_bytes(shape, packs) + image_bytes(shape, guided, slot_block)) / (1 - RESERVE)


def _plan_batch(shape: Shape, device: Device, batch: int, guided: bool) -> Plan:
    rows = batch * (2 if guided else 1)
    context = shape.prompt_tokens + (shape.image_tokens - 1) / 2
    read_s = shape.step_parameters * BYTES[shape.dtype] / device.bandwidth
    multiply_s = 2 * shape.step_parameters * rows / device.arithmetic
    cache_s = rows * context * shape.cache_bytes / device.bandwidth
    step_s = max(read_s, multiply_s) + cache_s
    batch_s = shape.image_tokens * step_s
    parts = {"reading the cache": cache_s, "reading the weights": read_s, "matrix products": multiply_s}
    weights = weight_bytes(shape, device.packs)
    return Plan(
        batch=batch,
        rows=rows,
        weight_bytes=weights,
        cache_bytes=rows * cache_slots(shape, device.slot_block) * shape.cache_bytes,
        peak_bytes=weights + batch * image_bytes(shape, guided, device.slot_block),
        step_s=step_s,
        batch_s=batch_s,
        images_per_s=batch / batch_s,
        bound=max(parts, key=lambda part: parts[part]),
    )


def explain(shape: Shape, device: Device, planned: Plan, guided: bool = True) -> str:
    """Format a plan and its arithmetic as lines for a terminal."""
    single = plan(shape, device, 1, guided)
    twice = ", the former twice" if device.packs and shape.dtype == "float32" else ""
    cache_dtype = "" if shape.kv_cache_dtype == "auto" else f" with its cache in {shape.cache_dtype}"
    return "\n".join(
        [
            f"{shape.name} in {shape.dtype}{cache_dtype} on {device.name}: {device.memory / 1e9:.0f} GB, "
            f"{device.bandwidth / 1e12:.2f} TB/s, {device.arithmetic / 1e12:.0f} Tflop/s",
            f"weights     ({shape.step_parameters / 1e6:.0f} M read per step + {shape.idle_parameters / 1e6:.0f} M"
            f"{twice}) x {BYTES[shape.dtype]} B = {planned.weight_bytes / 1e9:.2f} GB",
            f"cache       {planned.rows} rows x {cache_slots(shape, device.slot_block)} slots x "
            f"{shape.cache_bytes / 1024:.0f} KiB = {planned.cache_bytes / 1e9:.2f} GB",
            f"batch       {planned.batch} images at once, peak {planned.peak_bytes / 1e9:.2f} GB",
            f"at best     {planned.step_s * 1e3:.2f} ms per step x {shape.image_tokens} tokens = "
            f"{planned.batch_s:.2f} s per batch, {planned.images_per_s:.2f} images/s; a single image takes "
            f"{single.batch_s:.2f} s",
            f"bound by    {planned.bound}",
        ]
    )


def measure_device(
    device: torch.device, dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.perf_counter
) -> Device:
    """Measure a device of this machine.

    The bandwidth is that of reading far more than its caches hold, the arithmetic that of a square matrix product.

    Args:
        dtype: dtype of the matrix product.
        clock: the time in seconds, read before and after each round.
    """
    on_gpu = device.type == "cuda"
    size = 1 << 30 if on_gpu else 1 << 28
    source = torch.ones(size // 4, device=device)
    read_s = _fastest(lambda: source.sum(), device, clock)
    edge = 8192 if on_gpu else 2048
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    multiply_s = _fastest(lambda: a @ b, device, clock)
    kernels = None if on_gpu or dtype != torch.float32 else step_kernels()
    if kernels is not None:
        packed = kernels.pack(b)
        multiply_s = min(multiply_s, _fastest(lambda: kernels.multiply(a, packed), device, clock))
    memory = float(torch.cuda.get_device_properties(device).total_memory) if on_gpu else free_memory(device)
    name = torch.cuda.get_device_name(device) if on_gpu else f"this CPU, {torch.get_num_threads()} threads"
    return Device(
        name, memory, size / read_s, 2 * edge**3 / multiply_s, kernels is not None, SLOT_BLOCK if on_gpu else 1
    )


def _fastest(work: Callable[[], object], device: torch.device, clock: Callable[[], float], rounds: int = 7) -> float:
    """Return the seconds of the fastest of several rounds: other processes can only slow one down."""
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)
