"""Sampling noise: its three implementations against one table of hashes, and its statistics.

noise_vectors.json holds, for some (seed, step, vocabulary entry), the 24 bits that the noise is made of. `hash_bits`
computes them in Python's unbounded integers; `python tests/sampling/test_noise.py` prints the table.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vce_ray.config import SamplingConfig
from vce_ray.sampling import kernels
from vce_ray.sampling.choose import choose
from vce_ray.sampling.compiled import step_kernels
from vce_ray.sampling.noise import gumbel_noise, uniform_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VECTORS = Path(__file__).with_name("noise_vectors.json")
SEEDS = (0, 1, 2**63 - 1, -5)
STEPS = (0, 575, 2**40)
ENTRIES = (0, 16_383)
ALL_ONES = [(439, 53, 788), (593, 10, 932)]
ALL_ZEROS = [(317, 43, 273)]
PLACES = [(seed, step, entry) for seed in SEEDS for step in STEPS for entry in ENTRIES] + ALL_ONES + ALL_ZEROS


def mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def hash_bits(seed: int, step: int, entry: int) -> int:
    """The upper 24 bits of the hash."""
    golden = 0x9E3779B97F4A7C15
    stream = mix((mix(seed * golden % 2**64) + (step + 1) * golden) % 2**64)
    return mix((stream + (entry + 1) * golden) % 2**64) >> 40


def table() -> str:
    rows = [{"seed": s, "step": t, "entry": e, "bits": hash_bits(s, t, e)} for s, t, e in PLACES]
    return "[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n"


def vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Seeds, steps and entries of the table, int64 [N], and the uniform numbers that they stand for, float32 [N]."""
    rows = json.loads(VECTORS.read_text())
    seeds, steps, entries = (torch.tensor([row[key] for row in rows]) for key in ("seed", "step", "entry"))
    bits = np.array([row["bits"] for row in rows], dtype=np.float32)  # 24 bits: exact
    uniform = np.minimum((bits + np.float32(0.5)) / np.float32(2**24), np.float32(1 - 2.0**-24))
    return seeds, steps, entries, uniform


def gumbel_of(uniform: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(-np.log(-np.log(uniform.astype(np.float64)))).float()


def test_table_is_what_python_computes() -> None:
    assert VECTORS.read_text() == table()
    assert {hash_bits(*place) for place in ALL_ONES} == {2**24 - 1}
    assert {hash_bits(*place) for place in ALL_ZEROS} == {0}


def test_torch_reproduces_the_table_exactly() -> None:
    seeds, steps, entries, uniform = vectors()
    noise = uniform_noise(seeds, steps, max(ENTRIES) + 1)
    assert noise.dtype == torch.float32
    assert np.array_equal(noise.gather(1, entries[:, None])[:, 0].numpy(), uniform)
    for row, (seed, step) in enumerate(zip(seeds, steps.tolist(), strict=True)):
        assert torch.equal(uniform_noise(seed, step, 1024), noise[row, :1024]), "a step may also be an int"


def test_compiled_noise_reproduces_the_table() -> None:
    compiled = step_kernels()
    if compiled is None:
        pytest.skip("no C++ compiler on this machine")
    seeds, steps, entries, uniform = vectors()
    noise = compiled.gumbel(seeds, steps, max(ENTRIES) + 1)
    assert torch.isfinite(noise).all()
    torch.testing.assert_close(noise.gather(1, entries[:, None])[:, 0], gumbel_of(uniform), rtol=1e-5, atol=1e-5)


def test_triton_noise_reproduces_the_table() -> None:
    seeds, steps, entries, uniform = vectors()
    noise = kernels.gumbel(seeds.to(DEVICE), steps.to(DEVICE), max(ENTRIES) + 1).cpu()
    assert torch.isfinite(noise).all()
    torch.testing.assert_close(noise.gather(1, entries[:, None])[:, 0], gumbel_of(uniform), rtol=1e-5, atol=1e-5)


def test_noise_is_uniform_and_belongs_to_seed_and_step() -> None:
    seeds = torch.tensor([0, 1, 2**62, -5])
    noise = uniform_noise(seeds, 3, 50_000)
    assert noise.min() > 0 and noise.max() < 1
    assert torch.allclose(noise.mean(1), torch.full((4,), 0.5), atol=0.01)
    assert torch.allclose(noise.var(1), torch.full((4,), 1 / 12), atol=0.002)
    assert torch.equal(noise[1:2], uniform_noise(seeds[1:2], 3, 50_000))
    assert torch.equal(noise[:, :10], uniform_noise(seeds, 3, 10))
    others = torch.cat([noise[:1], noise[1:2], uniform_noise(seeds[:1], 4, 50_000)])
    assert torch.corrcoef(others).fill_diagonal_(0).abs().max() < 0.02


def test_gumbel_argmax_samples_from_the_softmax() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7])).repeat(40_000, 1)
    drawn = choose(logits, gumbel_noise(torch.arange(40_000), 0, 3), SamplingConfig())
    shares = drawn.bincount(minlength=3) / 40_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.01)
    assert math.isclose(gumbel_noise(torch.arange(2000), 0, 50).mean().item(), 0.5772, abs_tol=0.02)


if __name__ == "__main__":
    print(table(), end="")
