"""How many images fit into memory at once, and the sizes of batch and cache that follow from it."""

from __future__ import annotations

import sys
from math import isinf
from pathlib import Path
from typing import NamedTuple

import torch

from vce_ray.devices import NEEDED_CAPABILITY, RESERVE
from vce_ray.errors import UserError
from vce_ray.models.shape import BYTES, Shape
from vce_ray.sampling.cgroup import MEMBERSHIP, MOUNT, memory_limits

SLOT_BLOCK = 64
"""On a GPU the cache grows by blocks of this many slots, because every cache size needs its own captured steps."""
BATCH_SIZES = (1, 2, 4, 8, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Batch sizes that steps are captured for. Other batches are padded to one of them."""
MEMINFO = Path("/proc/meminfo")


class HostMemory(NamedTuple):
    """Memory outside of GPUs."""

    free: float
    """Bytes that can still be allocated; infinity if unknown."""
    limit: int | None
    """Limit in bytes of the container, if that and not the machine determines `free`."""


def free_memory(
    device: torch.device, meminfo: Path = MEMINFO, membership: Path = MEMBERSHIP, mount: Path = MOUNT
) -> float:
    """Return the bytes that can still be allocated on a device.

    Args:
        meminfo, membership, mount: as for `host_memory`, which is the result for CPUs.
    """
    if device.type == "cuda":
        # blocks that torch's allocator holds but does not use are as good as free
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_memory(meminfo, membership, mount).free


def host_memory(meminfo: Path = MEMINFO, membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> HostMemory:
    """Return what this process can still allocate: what the machine has available, or less inside a container.

    Args:
        meminfo: where Linux reports the memory of the machine. If it is missing, only the container counts, if any.
        membership, mount: as for `memory_limits`.
    """
    available = float("inf")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024.0
    limits = [HostMemory(limit.free, limit.bytes) for limit in memory_limits(membership, mount)]
    return min([HostMemory(available, None), *limits], key=lambda memory: memory.free)


def check_cache_dtype(kv_cache_dtype: str, device: torch.device) -> None:
    """Check that a device supports the dtype of the key-value cache.

    Raises:
        UserError: fp8 was asked for on a GPU without 8-bit floating point.
    """
    needed = NEEDED_CAPABILITY["fp8"]
    if kv_cache_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UserError(
            f"kv_cache_dtype fp8 needs a GPU of compute capability {needed[0]}.{needed[1]} or more, such as an L40S or "
            f"H100, and {name} has {capability[0]}.{capability[1]}: use auto"
        )


def fitting_batch(
    shape: Shape, memory: float, guided: bool, loaded: bool = False, packs: bool = False, slot_block: int = 1
) -> int:
    """Return how many images can be drawn at once in `memory` bytes; 0 if not even one fits.

    Args:
        guided: whether each image has an unconditional row beside its conditional one.
        loaded: whether the weights are in memory already and `memory` is what they have left.
        packs, slot_block: as for `weight_bytes` and `image_bytes`.
    """
    if isinf(memory):
        return sys.maxsize
    weights = 0 if loaded else weight_bytes(shape, packs)
    return max(0, int((memory * (1 - RESERVE) - weights) // image_bytes(shape, guided, slot_block)))


def weight_bytes(shape: Shape, packs: bool = False) -> int:
    """Return the bytes of all weights.

    Args:
        packs: whether float32 matrices read by a step are held a second time, in the layout of the compiled step.
    """
    copies = shape.step_parameters if packs and shape.dtype == "float32" else 0
    return (shape.step_parameters + shape.idle_parameters + copies) * BYTES[shape.dtype]


def image_bytes(shape: Shape, guided: bool, slot_block: int = 1) -> int:
    """Return the bytes that one image needs: the cache of its rows, and its logits.

    The logits are counted per row in the model's dtype, then guided, with noise and sorted: eight numbers of 4 bytes
    per entry of the vocabulary. If the cache has another dtype than the model, torch's operators read it through a
    copy of one layer, which is counted too.

    Args:
        slot_block: the cache is allocated in blocks of this many slots.
    """
    rows = 2 if guided else 1
    copied = shape.cache_bytes // shape.layers * BYTES[shape.dtype] // BYTES[shape.cache_dtype]
    slot_bytes = shape.cache_bytes + (copied if shape.cache_dtype != shape.dtype else 0)
    logits = shape.image_vocab * (rows * BYTES[shape.dtype] + 4 * 8)
    return rows * cache_slots(shape, slot_block) * slot_bytes + logits


def cache_slots(shape: Shape, slot_block: int = 1) -> int:
    """Return the cache slots of a row: a prompt and all image tokens but the last, which is never read again."""
    return round_up_slots(shape.prompt_tokens + shape.image_tokens - 1, slot_block)


def round_up_slots(slots: int, block: int) -> int:
    """Round a number of slots up to whole blocks."""
    return -(-slots // block) * block


def padded_batch(images: int, largest: int) -> int:
    """Return the batch size to draw this many images with a captured step: the next of BATCH_SIZES, at most `largest`.

    The surplus rows are drawn and thrown away.
    """
    return min(next((size for size in BATCH_SIZES if size >= images), images), largest)


def whole_batch(fitting: int) -> int:
    """Return the largest of BATCH_SIZES that is at most `fitting`; at least 1."""
    return max((size for size in BATCH_SIZES if size <= fitting), default=1)
