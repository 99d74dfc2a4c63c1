"""The kernels that CPUs draw with, as this machine's compiler makes them, against torch's own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel

from vce_ray.config import SamplingConfig
from vce_ray.env import COMPILE
from vce_ray.models.load import load_model
from vce_ray.sampling import compiled, draw
from vce_ray.sampling.compiled import StepKernels, step_kernels
from vce_ray.sampling.decoder import Decoder, _rotate, _signed_by_half
from vce_ray.sampling.noise import gumbel_noise
from vce_ray.sampling.packed import PackedStack

SEEDS = torch.tensor([0, 9, -5, 2**62])


@pytest.fixture(scope="module")
def kernels() -> StepKernels:
    made = step_kernels()
    if made is None:
        pytest.skip("no C++ compiler on this machine")
    return made


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=2e-6, rtol=2e-5)


def test_norm(kernels: StepKernels) -> None:
    for rows, width in ((5, 96), (300, 1500)):  # on one thread, and on all
        x, weight = randn(rows, width) + 1, randn(width)
        assert close(kernels.norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5))
    assert close(kernels.norm(x.T, randn(rows), 1e-5), F.rms_norm(x.T, (rows,), randn(rows), 1e-5)), "strides are read"


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 13, 32, 131])
@pytest.mark.parametrize("depth", [40, 256, 700])
def test_products_with_packed_matrices(kernels: StepKernels, rows: int, depth: int) -> None:
    x, matrix, bias = randn(rows, depth), randn(5 * kernels.panel, depth), randn(5 * kernels.panel)
    packed = kernels.pack(matrix)
    found, expected = kernels.multiply(x, packed), x.double() @ matrix.double().T
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert torch.allclose(kernels.multiply(x, packed, bias).double(), expected + bias, atol=1e-4)
    assert torch.equal(kernels.multiply(x[-1:], packed), found[-1:]), "to the bit, whatever rows are beside it"


@pytest.mark.parametrize("width", [24, 32, 64, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_writes_and_reads_each_row_up_to_its_own_slot(
    kernels: StepKernels, width: int, heads: int, key_heads: int
) -> None:
    rows, slots = 3, 21
    slot, first = torch.tensor([0, 11, 20]), torch.tensor([7, 0, 3])
    projected = randn(rows, (heads + 2 * key_heads) * width)
    angles = torch.outer(torch.arange(32.0), 100 ** -torch.linspace(0, 1, width // 2)).repeat(1, 2)
    cos, sin = angles.cos(), _signed_by_half(angles.sin())
    keys, values = randn(rows, key_heads, slots, width), randn(rows, key_heads, slots, width) + 1
    expected_keys, expected_values = keys.clone(), values.clone()
    query, key, value = projected.view(rows, -1, width).split([heads, key_heads, key_heads], dim=1)
    place = slot + first
    query, key = (_rotate(x, cos[place][:, None], sin[place][:, None]) for x in (query, key))
    expected = []
    for row, last in enumerate(slot.tolist()):
        expected_keys[row, :, last], expected_values[row, :, last] = key[row], value[row]
        live = [
            cache[row, :, : last + 1].repeat_interleave(heads // key_heads, 0)
            for cache in (expected_keys, expected_values)
        ]
        expected.append(F.scaled_dot_product_attention(query[row, :, None], live[0], live[1]).flatten())
    found = kernels.attend(projected, cos, sin, slot, first, keys, values)
    assert close(found, torch.stack(expected))
    assert close(keys, expected_keys) and torch.equal(values, expected_values)


def test_noise_is_that_of_every_other_device(kernels: StepKernels) -> None:
    steps = torch.tensor([0, 7, 575, 7])
    found = kernels.gumbel(SEEDS, steps, 1500)
    for noise, seed, step in zip(found, SEEDS, steps.tolist(), strict=True):
        assert torch.allclose(noise, gumbel_noise(seed, step, 1500), atol=1e-5)
    rare = kernels.gumbel(torch.tensor([439]), torch.tensor([53]), 1024)
    assert torch.isfinite(rare).all(), "all 24 bits are 1 there"


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2)])
def test_a_step_is_that_of_the_modules(kernels: StepKernels, heads: int, key_heads: int) -> None:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=3 * kernels.panel,
        intermediate_size=5 * kernels.panel,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=kernels.panel,
    )
    torch.manual_seed(0)
    net: Any = LlamaModel(config).eval()
    head = [nn.Linear(config.hidden_size, kernels.panel), nn.GELU()]
    packed, plain = Decoder(net, head), Decoder(net, head)
    prompts, lengths = randn(2, 4, config.hidden_size), torch.tensor([4, 2])
    begun = prompts, lengths, torch.tensor([0, 3]), torch.tensor([0, 1, 1]), 3
    for decoder in (packed, plain):
        decoder.keep([])
        decoder.join(*begun)
    plain._is_packed = False
    token = randn(3, config.hidden_size)
    for _ in range(3):
        found, expected = packed.step(token), plain.step(token)
        assert packed._is_packed and torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(packed.logits(found), plain.logits(expected), atol=1e-5)
    with torch.no_grad():
        net.layers[1].mlp.down_proj.weight.mul_(2)
    for decoder in (packed, plain):
        decoder.keep([])
        decoder.join(*begun)
    plain._is_packed = False
    assert torch.allclose(packed.step(token), plain.step(token), atol=1e-5), "a change of the weights is seen"


def test_nothing_is_compiled_for_weights_elsewhere() -> None:
    with torch.device("meta"):
        net = LlamaModel(
            LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        )
    step_kernels.cache_clear()
    assert not PackedStack(net, []).update() and step_kernels.cache_info().misses == 0


def test_without_a_compiler_the_same_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, settings = ["a deer", "an owl on a red background"], SamplingConfig(temperature=0.7)
    with_kernels = draw(load_model(), prompts, [1, 2], settings)
    monkeypatch.setenv(COMPILE.name, "0")
    step_kernels.cache_clear()
    try:
        assert step_kernels() is None
        assert torch.equal(draw(load_model(), prompts, [1, 2], settings), with_kernels)
    finally:
        step_kernels.cache_clear()


def test_a_compiler_that_fails_is_named_and_does_no_harm(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "--no-such-flag"))
    step_kernels.cache_clear()
    try:
        assert step_kernels() is None
        assert "no-such-flag" in caplog.text and "half the speed" in caplog.text
    finally:
        step_kernels.cache_clear()
