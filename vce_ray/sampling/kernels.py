"""What a drawing step does between its matrix products, on a GPU: one Triton kernel each.

torch's own operators would launch thirty small kernels a layer, and its attention reads the whole static cache or
wants a new shape at every step. These read and write only what is live, and take all that changes from one step to
the next (lengths, positions, the step itself) from tensors, so a step can be captured once and replayed.

Sums are taken in float32 whatever the dtype of weights and cache.

Shape legend: R rows, E width of the model, H query heads, K key-value heads, D width of a head, S cache slots,
F width of the feed-forward, B pictures, V image vocabulary.
"""

# pyright: reportCallIssue=false
# (the options of a launch, such as num_warps, are in no signature)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vce_ray.sampling.noise import BELOW_ONE, GOLDEN, MIX1, MIX2

PROGRAMS = 512
"""Attention is split along the cache until about so many programs run: a few for each multiprocessor of a large GPU."""
BLOCK = 64
"""Cache slots that a program reads at once."""


@triton.jit
def _add_norm(x, delta, weight, out, width, epsilon, HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * width + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(x + row * width + column, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / width + epsilon)
    normed = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(x_RE: Tensor, delta_RE: Tensor | None, weight_E: Tensor, epsilon: float) -> Tensor:
    """Adds `delta_RE` to the residual stream `x_RE` in place, and returns its RMSNorm."""
    rows, width = x_RE.shape
    out = torch.empty_like(x_RE)
    whole = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x_RE, delta_RE, weight_E, out, width, epsilon, delta_RE is not None, whole, num_warps=8 if whole > 2048 else 4
    )
    return out


@triton.jit
def _rotate_store(qkv, cos, sin, slots, first, query, keys, values, heads, key_heads, cache_slots, D: tl.constexpr):
    row, head, half = tl.program_id(0), tl.program_id(1), tl.arange(0, D // 2)
    slot = tl.load(slots + row)
    place = slot + tl.load(first + row)
    source = qkv + (row * (heads + 2 * key_heads) + head) * D
    left, right = tl.load(source + half), tl.load(source + D // 2 + half)
    if head < heads + key_heads:
        cosine = tl.load(cos + place * D + half).to(tl.float32)
        sine = tl.load(sin + place * D + D // 2 + half).to(tl.float32)
        low, high = left.to(tl.float32), right.to(tl.float32)
        left = (low * cosine - high * sine).to(left.dtype)
        right = (high * cosine + low * sine).to(right.dtype)
    if head < heads:
        target = query + (row * heads + head) * D
        tl.store(target + half, left)
        tl.store(target + D // 2 + half, right)
    else:
        owner = head - heads
        if owner < key_heads:
            kept = keys + ((row * key_heads + owner).to(tl.int64) * cache_slots + slot) * D
        else:
            kept = values + ((row * key_heads + owner - key_heads).to(tl.int64) * cache_slots + slot) * D
        tl.store(kept + half, left.to(keys.dtype.element_ty))
        tl.store(kept + D // 2 + half, right.to(keys.dtype.element_ty))


def rotate_store(
    qkv: Tensor, cos_SD: Tensor, sin_SD: Tensor, slots_R: Tensor, first_R: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotates queries and keys, puts keys and values into their slots, and returns the queries, [R, H, D].

    Args:
        qkv: projections, [R, (H + 2 K) D].
        cos_SD: cosines of the rotary embedding by position, both halves alike; of `sin_SD` the right half is read.
        slots_R: int64: the slot of each row that is written.
        first_R: int64: the position of each row's first slot.
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
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, line = tl.arange(0, D), tl.arange(0, BLOCK)
    live = tl.load(slots + row) + 1
    share = tl.cdiv(tl.cdiv(live, SPLITS), BLOCK) * BLOCK
    begin = part * share
    end = tl.minimum(begin + share, live)
    base = (row * (heads // group) + head // group).to(tl.int64) * cache_slots * D
    q = tl.load(query + (row * heads + head) * D + column).to(tl.float32) * scale
    best, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    gathered = tl.zeros([D], tl.float32)
    for start in range(begin, end, BLOCK):
        place = start + line
        inside = place < end
        offset = base + place[:, None] * D + column[None, :]
        k = tl.load(keys + offset, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + offset, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(k * q[None, :], 1), -float("inf"))
        highest = tl.maximum(best, tl.max(score, 0))
        weight = tl.exp2(score - highest)
        fade = tl.exp2(best - highest)
        total = total * fade + tl.sum(weight, 0)
        gathered = gathered * fade + tl.sum(weight[:, None] * v, 0)
        best = highest
    place = (row * heads + head) * SPLITS + part
    if SPLITS == 1:
        tl.store(out + place * D + column, (gathered / total).to(out.dtype.element_ty))
    else:
        tl.store(out + place * D + column, gathered)
        tl.store(sums + 2 * place, best)
        tl.store(sums + 2 * place + 1, total)


@triton.jit
def _join(parts, sums, out, D: tl.constexpr, SPLITS: tl.constexpr):
    place, column, part = tl.program_id(0), tl.arange(0, D), tl.arange(0, SPLITS)
    best = tl.load(sums + 2 * (place * SPLITS + part))
    total = tl.load(sums + 2 * (place * SPLITS + part) + 1)
    weight = tl.exp2(best - tl.max(best, 0))
    gathered = tl.load(parts + (place * SPLITS + part[:, None]) * D + column[None, :])
    result = tl.sum(gathered * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + place * D + column, result.to(out.dtype.element_ty))


def attend(query: Tensor, keys: Tensor, values: Tensor, slots_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of one query of each row over the slots up to its own: [R, H * D] in `dtype`.

    Args:
        query: [R, H, D].
        keys: the cache, contiguous [R, K, S, D]; heads that share keys are neighbours. `values` likewise.
        slots_R: int64: the last live slot of each row.
    """
    rows, heads, dim = query.shape
    key_heads, cache_slots = keys.shape[1:3]
    splits = 1
    while splits < 8 and rows * heads * splits < PROGRAMS:
        splits *= 2
    out = torch.empty(rows, heads * dim, dtype=dtype, device=query.device)
    scale = dim**-0.5 * 1.4426950408889634  # the kernel takes powers of two
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
    """silu of the left half times the right half: [R, F] of [R, 2 F]."""
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
    row, entry = tl.program_id(0), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    golden = tl.full([], GOLDEN, tl.uint64)
    seed = tl.load(seeds + row).to(tl.uint64)
    count = (tl.load(steps + row) + 1).to(tl.uint64)
    stream = _mix(_mix(seed * golden, MIX1, MIX2) + count * golden, MIX1, MIX2)
    bits = _mix(stream + (entry + 1).to(tl.uint64) * golden, MIX1, MIX2) >> 40
    uniform = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) / 16777216.0, BELOW_ONE)
    tl.store(out + row * vocabulary + entry, -tl.log(-tl.log(uniform)), mask=entry < vocabulary)


def gumbel(seeds_B: Tensor, steps_B: Tensor, size: int) -> Tensor:
    """noise.gumbel_noise of each seed at its step: float32 [B, size]."""
    out = torch.empty(len(seeds_B), size, dtype=torch.float32, device=seeds_B.device)
    _gumbel[(len(seeds_B), triton.cdiv(size, 1024))](
        seeds_B, steps_B, out, size, GOLDEN, MIX1, MIX2, BELOW_ONE, 1024, num_warps=4
    )
    return out
