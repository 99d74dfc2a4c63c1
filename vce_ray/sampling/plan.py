"""How many pictures to draw at once, and how long that takes at best: arithmetic on shapes, no weights.

A step of B pictures reads all weights once and the live part of every row's cache, and multiplies each row with
every weight. With R = 2B rows under guidance, weight bytes W = N * b (N parameters, b bytes each), context c, cache
bytes K of one token of one row, bandwidth BW and arithmetic F:

    seconds of a step = max(W / BW, 2 N R / F) + R c K / BW          (c: the prompt and half the image, on average)

Units: bytes, bytes/s, floating-point operations/s, seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import isinf

from vce_ray.errors import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
SLOT_BLOCK = 64
"""Slots that a cache grows by on a GPU, where each size costs captures of its own."""
RESERVE = 0.06
"""Share of a device's memory that is left to its runtime and to what grows beside the cache."""


@dataclass(frozen=True)
class Shape:
    """What drawing costs depend on."""

    name: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    image_vocab: int
    image_tokens: int
    head_parameters: int
    """From the last hidden state to the logits of an image token."""
    idle_parameters: int
    """Loaded, but not read at a step: text embedding and head, towers, image tokenizer, text encoder."""
    prompt_tokens: int = 40
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    """As SamplingConfig has it."""

    @property
    def step_parameters(self) -> int:
        """Read at every step."""
        attention = 2 * self.width**2 + 2 * self.width * (self.width // self.heads) * self.key_value_heads
        norms = 2 * self.width
        return self.layers * (attention + 3 * self.width * self.feed_forward + norms) + self.head_parameters

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token of one row."""
        return 2 * self.layers * self.key_value_heads * (self.width // self.heads) * BYTES[self.kept_dtype]

    @property
    def kept_dtype(self) -> str:
        """Of keys and values."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


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
"""Shapes that are planned for by name. The widths of Janus-Pro's feed-forward are DeepSeek-LLM's usual ones."""


@dataclass(frozen=True)
class Device:
    """A device's limits, as its maker states them or as they were measured."""

    name: str
    memory: float
    bandwidth: float
    arithmetic: float
    """Of dense matrix products, in the dtype of the weights."""
    packs: bool = False
    """Whether float32 matrices that a step reads are held twice, also in the layout that it multiplies fastest from."""
    slot_block: int = 1
    """The cache of a row has whole blocks of so many slots."""


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


@dataclass(frozen=True)
class Plan:
    """What drawing `batch` pictures at once takes at best."""

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
    """The plan of a batch; the largest useful one that fits where `batch` is None.

    Useful is a batch up to the one at which nine tenths of the throughput of an endless one are reached.

    Raises:
        UserError: not even one picture fits.
    """
    if batch is None:
        largest = fitting_batch(shape, device.memory, guided, packs=device.packs, slot_block=device.slot_block)
        if largest < 1:
            need = _measure(shape, device, 1, guided).peak_bytes / (1 - RESERVE)
            raise UserError(f"{shape.name} needs {need / 1e9:.1f} GB for one picture, {device.name} has less")
        limit = _measure(shape, device, 1 << 20, guided).images_per_s
        batch = next((b for b in range(1, largest) if _measure(shape, device, b, guided).images_per_s > 0.9 * limit), 0)
        batch = batch or largest
    return _measure(shape, device, batch, guided)


def fitting_batch(
    shape: Shape, memory: float, guided: bool, loaded: bool = False, packs: bool = False, slot_block: int = 1
) -> int:
    """How many pictures at once fit into `memory`; where `loaded`, the weights are in the device's memory already."""
    if isinf(memory):
        return sys.maxsize
    weights = 0 if loaded else _weight_bytes(shape, packs)
    return max(0, int((memory * (1 - RESERVE) - weights) // _bytes_of_picture(shape, guided, slot_block)))


BATCHES = (1, 2, 4, 8, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Sizes that batches have where another size costs another capture."""


def padded_batch(pictures: int, largest: int) -> int:
    """The size of the batch in which so many pictures are drawn, some of them for nothing; at most `largest`."""
    return min(next((size for size in BATCHES if size >= pictures), pictures), largest)


def whole_batch(fitting: int) -> int:
    """The largest of BATCHES of which no more than `fitting` pictures are; 1 at least."""
    return max((size for size in BATCHES if size <= fitting), default=1)


def _weight_bytes(shape: Shape, packs: bool) -> int:
    again = shape.step_parameters if packs and shape.dtype == "float32" else 0
    return (shape.step_parameters + shape.idle_parameters + again) * BYTES[shape.dtype]


def whole_slots(slots: int, block: int) -> int:
    """Slots up to the end of a block."""
    return -(-slots // block) * block


def _slots(shape: Shape, block: int) -> int:
    return whole_slots(shape.prompt_tokens + shape.image_tokens - 1, block)


def _bytes_of_picture(shape: Shape, guided: bool, slot_block: int) -> int:
    """Cache of a picture's rows, and its logits: of its rows, then guided, with noise and as float32 and int64.

    Where the cache has another dtype than the model, torch's own operators read a layer of it from a copy.
    """
    rows = 2 if guided else 1
    slots = _slots(shape, slot_block)
    copied = shape.cache_bytes // shape.layers * BYTES[shape.dtype] // BYTES[shape.kept_dtype]
    kept = shape.cache_bytes + (copied if shape.kept_dtype != shape.dtype else 0)
    return rows * slots * kept + shape.image_vocab * (rows * BYTES[shape.dtype] + 4 * 8)


def _measure(shape: Shape, device: Device, batch: int, guided: bool) -> Plan:
    rows = batch * (2 if guided else 1)
    context = shape.prompt_tokens + (shape.image_tokens - 1) / 2
    read_s = shape.step_parameters * BYTES[shape.dtype] / device.bandwidth
    multiply_s = 2 * shape.step_parameters * rows / device.arithmetic
    cache_s = rows * context * shape.cache_bytes / device.bandwidth
    step_s = max(read_s, multiply_s) + cache_s
    batch_s = shape.image_tokens * step_s
    parts = {"reading the cache": cache_s, "reading the weights": read_s, "matrix products": multiply_s}
    slots = _slots(shape, device.slot_block)
    weights = _weight_bytes(shape, device.packs)
    return Plan(
        batch=batch,
        rows=rows,
        weight_bytes=weights,
        cache_bytes=rows * slots * shape.cache_bytes,
        peak_bytes=weights + batch * _bytes_of_picture(shape, guided, device.slot_block),
        step_s=step_s,
        batch_s=batch_s,
        images_per_s=batch / batch_s,
        bound=max(parts, key=lambda part: parts[part]),
    )


def explain(shape: Shape, device: Device, found: Plan, guided: bool = True) -> str:
    """A plan with its arithmetic, as lines for a terminal."""
    size = BYTES[shape.dtype]
    slots = _slots(shape, device.slot_block)
    alone = plan(shape, device, 1, guided)
    again = ", the former twice" if device.packs and shape.dtype == "float32" else ""
    kept = "" if shape.kv_cache_dtype == "auto" else f", its cache in {shape.kept_dtype},"
    return "\n".join(
        [
            f"{shape.name} in {shape.dtype}{kept} on {device.name}: {device.memory / 1e9:.0f} GB, "
            f"{device.bandwidth / 1e12:.2f} TB/s, {device.arithmetic / 1e12:.0f} Tflop/s",
            f"weights     ({shape.step_parameters / 1e6:.0f} M read at a step + {shape.idle_parameters / 1e6:.0f} M"
            f"{again}) x {size} B = {found.weight_bytes / 1e9:.2f} GB",
            f"cache       {found.rows} rows x {slots} slots x {shape.cache_bytes / 1024:.0f} KiB "
            f"= {found.cache_bytes / 1e9:.2f} GB",
            f"batch       {found.batch} pictures at once, peak {found.peak_bytes / 1e9:.2f} GB",
            f"at best     {found.step_s * 1e3:.2f} ms a step x {shape.image_tokens} tokens = {found.batch_s:.2f} s "
            f"a batch, {found.images_per_s:.2f} pictures/s; one alone {alone.batch_s:.2f} s",
            f"bound by    {found.bound}",
        ]
    )
