"""How many images fit into memory: arithmetic by hand, and batches that keep to it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_shape import TINY

from vce_ray.config import SamplingConfig
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.sampling.decoder import decoder_of
from vce_ray.sampling.memory import (
    BATCH_SIZES,
    RESERVE,
    cache_slots,
    fitting_batch,
    free_memory,
    host_memory,
    image_bytes,
    padded_batch,
    weight_bytes,
    whole_batch,
)
from vce_ray.sampling.rolling import RollingBatch


def test_memory_by_hand() -> None:
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8  # queries and output, keys and values, feed-forward, norms
    assert TINY.step_parameters == 2 * layer + 50
    assert TINY.cache_bytes == 2 * 2 * 4 * 4  # keys and values, layers, width of a head, bytes
    assert weight_bytes(TINY) == (TINY.step_parameters + 1000) * 4
    assert weight_bytes(TINY, packs=True) == (2 * TINY.step_parameters + 1000) * 4
    assert cache_slots(TINY) == 5 + 10 - 1 and cache_slots(TINY, slot_block=64) == 64
    logits = 100 * (2 * 4 + 32)
    assert image_bytes(TINY, guided=True) == 2 * 14 * 64 + logits
    assert image_bytes(TINY, guided=False) == 14 * 64 + 100 * (4 + 32)
    eight_bits = replace(TINY, kv_cache_dtype="fp8")
    assert eight_bits.cache_bytes == 16
    assert image_bytes(eight_bits, guided=True) == 2 * 14 * (16 + 32) + logits  # and one layer copied to float32


def test_the_batch_fits_and_one_more_would_not() -> None:
    memory = 1e6
    batch = fitting_batch(TINY, memory, guided=True)
    needed = [weight_bytes(TINY) + n * image_bytes(TINY, guided=True) for n in (batch, batch + 1)]
    assert needed[0] <= memory * (1 - RESERVE) < needed[1]
    loaded = fitting_batch(TINY, memory - weight_bytes(TINY) / (1 - RESERVE), guided=True, loaded=True)
    assert loaded == batch
    assert fitting_batch(TINY, 1.0, guided=True) == 0
    assert fitting_batch(TINY, float("inf"), guided=True) > 10**6  # the operating system does not report its memory


def test_free_memory_of_a_cpu(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4096 kB\nMemAvailable:   2048 kB\nHugePages_Free: 0\n")
    missing = tmp_path / "missing"
    assert free_memory(torch.device("cpu"), meminfo, missing, missing) == 2048 * 1024
    assert free_memory(torch.device("cpu"), missing, missing, missing) == float("inf")


GIB = 1 << 30
V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
SENTINEL = 9223372036854771712
"""What version 1 reports as no limit."""


@pytest.mark.parametrize(
    ("membership", "groups", "free", "limit"),
    [
        ("0::/\n", {"": (V2, 4 * GIB, 1 * GIB)}, 3 * GIB, 4 * GIB),
        ("0::/pod/box\n", {"pod/box": (V2, 4 * GIB, 1 * GIB), "pod": (V2, "max", 1)}, 3 * GIB, 4 * GIB),
        ("0::/pod/box\n", {"pod/box": (V2, 4 * GIB, 1 * GIB), "pod": (V2, 5 * GIB, 3 * GIB)}, 2 * GIB, 5 * GIB),
        ("0::/pod/box\n", {"pod": (V2, 2 * GIB, 3 * GIB)}, 0, 2 * GIB),  # its own files are missing
        ("0::/../other\n", {"": (V2, 4 * GIB, 1 * GIB), "other": (V2, 1, 1)}, 3 * GIB, 4 * GIB),
        ("4:memory:/box\n0::/\n", {"unified": (V2, 2 * GIB, GIB)}, GIB, 2 * GIB),
        ("4:memory:/box\n1:cpu:/\n", {"memory/box": (V1, 4 * GIB, GIB)}, 3 * GIB, 4 * GIB),
        ("4:cpu,memory:/docker/1a\n", {"memory": (V1, 4 * GIB, GIB)}, 3 * GIB, 4 * GIB),  # mounted as the root
        ("4:memory:/a:b\n", {"memory/a:b": (V1, 4 * GIB, GIB)}, 3 * GIB, 4 * GIB),
        ("4:memory:/box\n", {"memory/box": (V1, SENTINEL, GIB)}, 8 * GIB, None),
        ("0::/\n", {"": (V2, "max", GIB)}, 8 * GIB, None),
        ("0::/\n", {"": (V2, 32 * GIB, GIB)}, 8 * GIB, None),  # more than the machine has
        ("0::/\n", {}, 8 * GIB, None),
        ("1:cpu:/box\n", {"memory/box": (V1, 4 * GIB, GIB)}, 8 * GIB, None),
    ],
)
def test_free_memory_in_a_container(
    tmp_path: Path,
    membership: str,
    groups: dict[str, tuple[tuple[str, str], int | str, int]],
    free: int,
    limit: int | None,
) -> None:
    meminfo, cgroup, mount = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "mount"
    meminfo.write_text(f"MemAvailable:   {8 * GIB // 1024} kB\n")
    cgroup.write_text(membership)
    for name, (files, maximum, usage) in groups.items():
        (mount / name).mkdir(parents=True, exist_ok=True)
        (mount / name / files[0]).write_text(f"{maximum}\n")
        (mount / name / files[1]).write_text(f"{usage}\n")
    assert host_memory(meminfo, cgroup, mount) == (free, limit)
    assert free_memory(torch.device("cpu"), meminfo, cgroup, mount) == free


@pytest.mark.parametrize(("files", "folder", "key"), [(V1, "memory", "total_inactive_file"), (V2, "", "inactive_file")])
def test_page_cache_of_a_container_counts_as_free(
    tmp_path: Path, files: tuple[str, str], folder: str, key: str
) -> None:
    cgroup, group = tmp_path / "cgroup", tmp_path / "mount" / folder
    group.mkdir(parents=True)
    cgroup.write_text("4:memory:/\n0::/\n")
    (group / files[0]).write_text(f"{4 * GIB}")
    (group / files[1]).write_text(f"{4 * GIB - 4096}")
    (group / "memory.stat").write_text(f"anon 1\n{key} {3 * GIB}\nactive_file 5\n")
    assert host_memory(tmp_path / "missing", cgroup, tmp_path / "mount") == (3 * GIB + 4096, 4 * GIB)


def test_batches_are_padded_to_few_sizes() -> None:
    largest = BATCH_SIZES[-1]
    sizes = [padded_batch(images, largest) for images in range(1, largest + 1)]
    assert set(sizes) == set(BATCH_SIZES)
    assert all(size >= images for images, size in enumerate(sizes, 1))
    assert all(after <= 2 * before for before, after in pairwise(BATCH_SIZES)), "less than half of a batch is padding"
    assert padded_batch(33, largest=35) == 35
    for images in range(1, largest + 1):
        assert whole_batch(images) == max(size for size in BATCH_SIZES if size <= images)
    assert whole_batch(0) == 1


def test_the_shape_of_a_loaded_model_counts_its_weights() -> None:
    model = load_model(device="cpu")
    layers = sum(p.numel() for p in model.language_model.layers.parameters())
    assert model.shape.step_parameters == layers + sum(p.numel() for p in model.image_head.parameters())
    table = model.image_embeddings_VE.numel()
    assert model.shape.step_parameters + model.shape.idle_parameters == table + sum(
        p.numel() for p in model.net.parameters()
    )
    draw(model, ["a deer"] * 3, [1, 2, 3], SamplingConfig())
    prompt = model.encode_prompts(["a deer"]).mask_BP.shape[1]
    assert decoder_of(model).cache_bytes == 3 * 2 * (prompt + 63) * model.shape.cache_bytes


def test_short_memory_makes_smaller_batches_of_the_same_images() -> None:
    model = load_model(device="cpu")
    prompts, seeds = ["a deer", "a house on a red background"] * 2, [1, 2, 3, 4]
    memory = 3.5 * image_bytes(model.shape, guided=True) / (1 - RESERVE)
    batch = RollingBatch[int](model, SamplingConfig(), memory_limit=memory)
    started, sizes, drawn = 0, [], {}
    while started < len(prompts):
        sizes.append(batch.join(range(started, len(prompts)), prompts[started:], seeds[started:]))
        assert batch.join([99], ["a deer"], [1]) == (1 if sizes[-1] < 3 else 0), "three at most"
        batch.drop([99])
        started += sizes[-1]
        drawn |= batch.advance(model.num_image_tokens)
    assert sizes == [3, 1]
    assert torch.equal(torch.stack([drawn[i] for i in range(4)]), draw(model, prompts, seeds, SamplingConfig()))


def test_one_image_is_drawn_however_little_memory_there_is() -> None:
    batch = RollingBatch[int](load_model(device="cpu"), SamplingConfig(), memory_limit=0)
    assert batch.join(range(2), ["a deer"] * 2, [1, 2]) == 1


def test_fewer_images_fit_beside_long_prompts() -> None:
    model = load_model(device="cpu")
    memory = 4.2 * image_bytes(model.shape, guided=True) / (1 - RESERVE)
    batch = RollingBatch[int](model, SamplingConfig(batch_size=16), memory_limit=memory)
    short, long = ["a deer"] * 8, ["a deer " * 40] * 8
    assert batch.join(range(8), short, range(8)) == 4
    batch.advance(3)
    batch.drop([0, 1])
    assert batch.join(range(8, 16), long, range(8)) == 0
    batch.drop([2])
    assert batch.join(range(8, 16), long, range(8)) == 1
    assert batch.join(range(16, 24), short, range(8)) == 0, "their rows would be as long"
    slots = decoder_of(model).slots
    batch.drop([3, 8])
    assert batch.join(range(8), short, range(8)) == 4
    assert decoder_of(model).slots < slots, "the long rows were freed"


@pytest.mark.parametrize("cached", [False, True])
def test_by_default_a_batch_takes_the_free_memory(monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    model = load_model(device="cpu")
    if cached:
        draw(model, ["a deer"] * 8, list(range(8)), SamplingConfig())
    free = 3.5 * image_bytes(model.shape, guided=True) / (1 - RESERVE) - decoder_of(model).cache_bytes
    monkeypatch.setattr("vce_ray.sampling.rolling.free_memory", lambda device: free)
    batch = RollingBatch[int](model, SamplingConfig())
    assert batch.join(range(8), ["a deer"] * 8, range(8)) == 3, "the present cache counts as free"
