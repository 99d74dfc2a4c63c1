"""Triton kernels for the parts of a sampling step between its matrix products.

torch's operators would launch thirty small kernels per layer, and its attention either reads the whole static cache or
needs a new shape at every step. These kernels read and write only the slots in use, and take everything that changes
from one step to the next (slots, positions, step numbers) from tensors, so that a step can be captured once and
replayed.

All sums are accumulated in float32, whatever the dtype of weights and cache.

Shape legend: R rows, E width of the model, H query heads, K key-value heads, D width of a head, S cache slots,
F width of the feed-forward, B images, V image vocabulary.
"""

# pyright: reportCallIssue=false
# (launch options such as num_warps are not part of a kernel's signature)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vce_ray.sampling.noise import BELOW_ONE, GOLDEN, MIX1, MIX2

PROGRAMS = 512
"""Attention is split along the cache until about this many programs run: a few per multiprocessor of a large GPU."""
BLOCK = 64
"""Cache slots that a program reads at once."""


@triton.jit
def _add_norm(x, delta, weight, out, width, epsilon, HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * width + column, mask=inside, other=0.0).to(tl.float32)
        # Round before normalizing, so that the norm sees the value that is stored, as it would with torch's operators.
        value = value.to(x.dtype.element_ty)
        tl.store(x + row * width + column, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / width + epsilon)
    normed = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(x_RE: Tensor, delta_RE: Tensor | None, weight_E: Tensor, epsilon: float) -> Tensor:
    """Add `delta_RE` to the residual stream `x_RE` in place, and return the RMSNorm of the sum."""
    rows, width = x_RE.shape
    out = torch.empty_like(x_RE)
    whole = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x_RE, delta_RE, weight_E, out, width, epsilon, delta_RE is not None, whole, num_warps=8 if whole > 2048 else 4
    )
    return out


@triton.jit
def _rotate_store(qkv, cos, sin, slots, first, query, keys, values, heads, key_heads, cache_slots, D: tl.constexpr):
    # One program per row and head: heads 0 .. H-1 are queries, then K heads of keys, then K heads of values.
    row, head, half = tl.program_id(0), tl.program_id(1), tl.arange(0, D // 2)
    slot = tl.load(slots + row)
    position = slot + tl.load(first + row)
    source = qkv + (row * (heads + 2 * key_heads) + head) * D
    left, right = tl.load(source + half), tl.load(source + D // 2 + half)
    if head < heads + key_heads:
        cosine = tl.load(cos + position * D + half).to(tl.float32)
        sine = tl.load(sin + position * D + D // 2 + half).to(tl.float32)
        low, high = left.to(tl.float32), right.to(tl.float32)
        left = (low * cosine - high * sine).to(left.dtype)
        right = (high * cosine + low * sine).to(right.dtype)
    if head < heads:
        target = query + (row * heads + head) * D
        tl.store(target + half, left)
        tl.store(target + D // 2 + half, right)
    else:
        # 64-bit offsets: for large batches the keys of one layer have more than 2^31 elements.
        key_head = head - heads
        if key_head < key_heads:
            cached = keys + ((row * key_heads + key_head).to(tl.int64) * cache_slots + slot) * D
        else:
            cached = values + ((row * key_heads + key_head - key_heads).to(tl.int64) * cache_slots + slot) * D
        tl.store(cached + half, left.to(keys.dtype.element_ty))
        tl.store(cached + D // 2 + half, right.to(keys.dtype.element_ty))


def rotate_store(
    qkv: Tensor, cos_SD: Tensor, sin_SD: Tensor, slots_R: Tensor, first_R: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, write keys and values to their slots, and return the queries, [R, H, D].

    Args:
        qkv: projections, [R, (H + 2 K) D].
        cos_SD: cosines of the rotary embedding by position; both halves are equal.
        sin_SD: sines; only the right half is read, so it does not matter that the left one is negated.
        slots_R: int64: the slot of each row to write to.
        first_R: int64: the position of each row's slot 0.
        keys: the cache, contiguous [R, K, S, D]; `values` likewise.
    """
    rows, key_heads, cache_slots, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * key_heads
    query = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_store[(rows, heads + 2 * key_heads)](
        qkv, cos_SD, sin_SD, slots_R, first_R, query, keys, values, heads, key_heads, cache_slots, dim, num_warps=1
    )
    return query


@triton.jit
def _attend(
    query, keys, values, slots, out, sums, heads, group, cache_slots, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # Flash decoding: the live slots of a row are divided among SPLITS programs, each of which keeps a running maximum,
    # sum and weighted values (online softmax), and `_join` combines their results.
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, line = tl.arange(0, D), tl.arange(0, BLOCK)
    live = tl.load(slots + row) + 1
    share = tl.cdiv(tl.cdiv(live, SPLITS), BLOCK) * BLOCK
    first = part * share
    end = tl.minimum(first + share, live)
    base = (row * (heads // group) + head // group).to(tl.int64) * cache_slots * D
    q = tl.load(query + (row * heads + head) * D + column).to(tl.float32) * scale
    highest, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    gathered = tl.zeros([D], tl.float32)
    for start in range(first, end, BLOCK):
        slot = start + line
        inside = slot < end
        offset = base + slot[:, None] * D + column[None, :]
        k = tl.load(keys + offset, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + offset, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(k * q[None, :], 1), -float("inf"))
        new_highest = tl.maximum(highest, tl.max(score, 0))
        weight = tl.exp2(score - new_highest)
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weight, 0)
        gathered = gathered * rescale + tl.sum(weight[:, None] * v, 0)
        highest = new_highest
    index = (row * heads + head) * SPLITS + part
    if SPLITS == 1:
        tl.store(out + index * D + column, (gathered / total).to(out.dtype.element_ty))
    else:
        # A program without live slots stores a maximum of -inf, which gives it weight 0 in `_join`.
        tl.store(out + index * D + column, gathered)
        tl.store(sums + 2 * index, highest)
        tl.store(sums + 2 * index + 1, total)


@triton.jit
def _join(parts, sums, out, D: tl.constexpr, SPLITS: tl.constexpr):
    index, column, part = tl.program_id(0), tl.arange(0, D), tl.arange(0, SPLITS)
    highest = tl.load(sums + 2 * (index * SPLITS + part))
    total = tl.load(sums + 2 * (index * SPLITS + part) + 1)
    weight = tl.exp2(highest - tl.max(highest, 0))
    gathered = tl.load(parts + (index * SPLITS + part[:, None]) * D + column[None, :])
    result = tl.sum(gathered * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + index * D + column, result.to(out.dtype.element_ty))


def attend(query: Tensor, keys: Tensor, values: Tensor, slots_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Attend with one query per row to the slots up to and including the row's own: [R, H * D] in `dtype`.

    Args:
        query: [R, H, D].
        keys: the cache, contiguous [R, K, S, D]; heads that share keys are neighbours. `values` likewise.
        slots_R: int64: the last slot of each row to read.
    """
    rows, heads, dim = query.shape
    key_heads, cache_slots = keys.shape[1:3]
    splits = 1  # chosen by the number of rows, not by their lengths: a captured grid is fixed, lengths grow
    while splits < 8 and rows * heads * splits < PROGRAMS:
        splits *= 2
    out = torch.empty(rows, heads * dim, dtype=dtype, device=query.device)
    scale = dim**-0.5 * 1.4426950408889634  # log2(e): the kernel computes powers of two instead of e
    grid, shape = (rows, heads, splits), (heads, heads // key_heads, cache_slots, scale)
    if splits == 1:
        _attend[grid](query, keys, values, slots_R, out, out, *shape, dim, BLOCK, 1, num_warps=4)
        return out
    parts = torch.empty(rows * heads * splits, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(rows * heads * splits, 2, dtype=torch.float32, device=query.device)
    _attend[grid](query, keys, values, slots_R, parts, sums, *shape, dim, BLOCK, splits, num_warps=4)
    _join[(rows * heads,)](parts, sums, out, dim, splits, num_warps=1)
    return out


@triton.jit
def _gate(both, out, width, SIZE: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def gate(both: Tensor) -> Tensor:
    """Return silu of the left half times the right half: [R, F] from [R, 2 F]."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    _gate[(rows, triton.cdiv(width, 1024))](both, out, width, 1024, num_warps=4)
    return out


@triton.jit
def _mix(x, MIX1: tl.constexpr, MIX2: tl.constexpr):
    x = (x ^ (x >> 30)) * tl.full([], MIX1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], MIX2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _gumbel(
    seeds, steps, out, vocabulary,
    GOLDEN: tl.constexpr, MIX1: tl.constexpr, MIX2: tl.constexpr, BELOW_ONE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    # The hash of noise.py. Unsigned integers shift logically and wrap around, so it needs no masks here.
    row, entry = tl.program_id(0), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    golden = tl.full([], GOLDEN, tl.uint64)
    seed = tl.load(seeds + row).to(tl.uint64)
    count = (tl.load(steps + row) + 1).to(tl.uint64)
    stream = _mix(_mix(seed * golden, MIX1, MIX2) + count * golden, MIX1, MIX2)
    bits = _mix(stream + (entry + 1).to(tl.uint64) * golden, MIX1, MIX2) >> 40
    uniform = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) / 16777216.0, BELOW_ONE)
    tl.store(out + row * vocabulary + entry, -tl.log(-tl.log(uniform)), mask=entry < vocabulary)


def gumbel(seeds_B: Tensor, steps_B: Tensor, size: int) -> Tensor:
    """Return `noise.gumbel_noise` of seeds and steps: float32 [B, size]."""
    out = torch.empty(len(seeds_B), size, dtype=torch.float32, device=seeds_B.device)
    _gumbel[(len(seeds_B), triton.cdiv(size, 1024))](
        seeds_B, steps_B, out, size, GOLDEN, MIX1, MIX2, BELOW_ONE, 1024, num_warps=4
    )
    return out
