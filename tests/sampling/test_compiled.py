"""The kernels for CPUs, built by this machine's compiler, against torch's operators."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from vce_ray.config import SamplingConfig
from vce_ray.env import COMPILE
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.sampling.compiled import FLAGS, StepKernels, compile_kernels, step_kernels
from vce_ray.sampling.decoder import Decoder, decoder_of
from vce_ray.sampling.packed import PackedStack


@pytest.fixture(scope="module")
def kernels() -> StepKernels:
    compiled = step_kernels()
    if compiled is None:
        pytest.skip("no C++ compiler on this machine")
    return compiled


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 13, 32, 131])
@pytest.mark.parametrize("depth", [40, 256, 700])
def test_products_with_packed_matrices(kernels: StepKernels, rows: int, depth: int) -> None:
    x, matrix, bias = randn(rows, depth), randn(5 * kernels.panel, depth), randn(5 * kernels.panel)
    packed = kernels.pack(matrix)
    product, expected = kernels.multiply(x, packed), x.double() @ matrix.double().T
    assert torch.allclose(product.double(), expected, atol=1e-4)
    assert torch.allclose(kernels.multiply(x, packed, bias).double(), expected + bias, atol=1e-4)
    assert torch.equal(kernels.multiply(x[-1:], packed), product[-1:]), "identical bits, whatever rows are beside it"


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the kernels are switched off."""

    @contextmanager
    def switched_off() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setenv(COMPILE.name, "0")
            yield

    return switched_off


# the head widths with an attention of their own in step.cpp, and one without; 1, 2 and 4 queries per key-value head
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 32), (8, 4, 24), (4, 1, 64), (2, 1, 128)])
def test_a_step_equals_torch_operators(
    kernels: StepKernels,
    without_kernels: Callable[[], AbstractContextManager[None]],
    heads: int,
    key_heads: int,
    width: int,
) -> None:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=3 * kernels.panel,
        intermediate_size=5 * kernels.panel,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width,
    )
    torch.manual_seed(0)
    net: Any = LlamaModel(config).eval()
    head = [nn.Linear(config.hidden_size, kernels.panel), nn.GELU()]
    packed, plain = Decoder(net, head), Decoder(net, head)
    prompts, lengths = randn(2, 4, config.hidden_size), torch.tensor([4, 2])
    rows = prompts, lengths, torch.tensor([0, 3]), torch.tensor([0, 1, 1]), 3

    def start() -> None:
        for decoder in (packed, plain):
            decoder.keep([])
        packed.join(*rows)
        with without_kernels():
            plain.join(*rows)
        assert packed.uses_compiled_step and not plain.uses_compiled_step

    start()
    token = randn(3, config.hidden_size)
    for _ in range(3):
        compiled_hidden, expected = packed.step(token), plain.step(token)
        assert torch.allclose(compiled_hidden, expected, atol=1e-5)
        assert torch.allclose(packed.logits(compiled_hidden), plain.logits(expected), atol=1e-5)
    for ours, theirs in zip(packed.cache(3), plain.cache(3), strict=True):
        for layer, expected_layer in zip(ours, theirs, strict=True):
            assert torch.allclose(layer, expected_layer, atol=1e-5)
    with torch.no_grad():
        net.layers[1].mlp.down_proj.weight.mul_(2)
    start()
    assert torch.allclose(packed.step(token), plain.step(token), atol=1e-5), "changed weights are packed again"


def test_nothing_is_compiled_for_weights_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vce_ray.sampling.packed.step_kernels", lambda: pytest.fail("compiled in vain"))
    with torch.device("meta"):
        net = LlamaModel(
            LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        )
    assert not PackedStack(net, []).update()


def test_without_kernels_the_same_images_are_drawn(without_kernels: Callable[[], AbstractContextManager[None]]) -> None:
    prompts, settings = ["a deer", "an owl on a red background"], SamplingConfig(temperature=0.7)
    with_kernels = draw(load_model(), prompts, [1, 2], settings)
    with without_kernels():
        assert step_kernels() is None
        assert torch.equal(draw(load_model(), prompts, [1, 2], settings), with_kernels)


def test_a_failing_compiler_is_reported_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    assert compile_kernels(flags=(*FLAGS, "--no-such-flag")) is None
    assert "no-such-flag" in caplog.text and "half the speed" in caplog.text


DRAW_TWICE = """
import sys, torch
from vce_ray.config import SamplingConfig
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
drawn = [draw(load_model(device="cpu"), ["a deer"], [1], SamplingConfig(temperature=0.7)) for _ in range(2)]
torch.save(drawn, sys.argv[1])
"""


def test_a_missing_compiler_is_reported_once_and_the_same_images_are_drawn(tmp_path: Path) -> None:
    file, environment = tmp_path / "drawn.pt", os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", DRAW_TWICE, str(file)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "compile" in line]
    assert "half the speed" in warning and "apt-get install g++" in warning and COMPILE.name in warning
    expected = draw(load_model(device="cpu"), ["a deer"], [1], SamplingConfig(temperature=0.7))
    assert all(torch.equal(drawn, expected) for drawn in torch.load(file))


def test_changes_that_autograd_does_not_count_are_drawn_too(kernels: StepKernels) -> None:
    model, settings = load_model(device="cpu"), SamplingConfig(temperature=0, guidance_scale=2)
    layer = model.language_model.layers[-1]
    down, norm = layer.mlp.down_proj, layer.post_attention_layernorm

    def drawn() -> torch.Tensor:
        tokens = draw(model, ["a deer", "an owl on a red background"], [1, 2], settings)
        assert decoder_of(model).uses_compiled_step
        return tokens

    def check_noticed(before: torch.Tensor) -> None:
        after = drawn()
        assert not torch.equal(after, before)
        decoder_of(model)._packed = PackedStack(model.language_model, model.image_head_parts)
        assert torch.equal(drawn(), after), "as with weights packed for the first time"

    original, before = down.weight.clone(), drawn()
    with torch.no_grad():
        down.weight.data.mul_(2)
    check_noticed(before)
    down.weight.data.copy_(original)
    assert torch.equal(drawn(), before)
    with torch.inference_mode():
        down.weight.data.numpy()[:] *= 2
    check_noticed(before)
    down.weight.data.copy_(original)
    before = drawn()
    down.weight.grad = torch.ones_like(down.weight)
    torch.optim.AdamW([down.weight], lr=0.05, fused=True).step()
    check_noticed(before)
    down.weight.data.copy_(original)
    before = drawn()
    norm.weight = nn.Parameter(-norm.weight)  # norms are not copied, but their addresses are kept
    check_noticed(before)


def test_unchanged_weights_are_packed_once(kernels: StepKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(device="cpu")
    with torch.no_grad():
        model.language_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")  # which differs from itself
    decoder_of(model).prepare()
    monkeypatch.setattr(StepKernels, "pack", lambda *_: pytest.fail("packed again"))
    decoder_of(model).prepare()


def test_weights_made_in_inference_mode_are_packed(kernels: StepKernels) -> None:
    model, prompts, settings = load_model(device="cpu"), ["a deer"], SamplingConfig(temperature=0)
    expected, down = draw(model, prompts, [1], settings), model.language_model.layers[0].mlp.down_proj
    with torch.inference_mode():
        down.weight = nn.Parameter(down.weight.clone(), requires_grad=False)
    assert down.weight.is_inference()
    assert torch.equal(draw(model, prompts, [1], settings), expected)
    assert decoder_of(model).uses_compiled_step


@pytest.mark.parametrize("part", ["head", "norm"])
def test_a_part_of_another_dtype_is_not_packed(kernels: StepKernels, part: str) -> None:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=2 * kernels.panel,
        intermediate_size=kernels.panel,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    net, head = LlamaModel(config), nn.Linear(config.hidden_size, kernels.panel)
    assert PackedStack(net, [head]).update()
    (head if part == "head" else net.layers[0].input_layernorm).bfloat16()
    assert not PackedStack(net, [head]).update(), "its numbers would be read as float32"
