"""The sampling step for GPUs on a CPU: its kernels in Triton's interpreter, and compiled for two GPU generations."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration

from benchmarks.decode import RandomLlamaGen
from vce_ray.config import SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.janus import Janus
from vce_ray.models.llamagen.gpt import GPTConfig
from vce_ray.models.load import load_model
from vce_ray.sampling import captured, decoder, draw, fallback, kernels, layers, rolling
from vce_ray.sampling.decoder import decoder_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=2e-6, rtol=2e-5)


def test_residual_norm_and_gate():
    x, delta, weight = randn(5, 96), randn(5, 96) + 1, randn(96)
    summed = x + delta
    assert close(kernels.add_norm(x, delta, weight, 1e-5), F.rms_norm(summed, (96,), weight, 1e-5))
    assert torch.equal(x, summed), "the residual stream is added to in place"
    assert close(kernels.add_norm(x, None, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5))
    both = randn(3, 2 * 1500)
    assert close(kernels.gate(both), F.silu(both[:, :1500]) * both[:, 1500:])


@pytest.mark.parametrize("programs", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_attention_reads_each_row_up_to_its_own_slot(monkeypatch, programs: int, heads: int, key_heads: int):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    slots = torch.tensor([0, 63, 64, 149], device=DEVICE)
    query, keys, values = randn(4, heads, 32), randn(4, key_heads, 150, 32), randn(4, key_heads, 151, 32)[:, :, :150]
    keys, values = keys.contiguous(), values.contiguous()
    for row, slot in enumerate(slots.tolist()):
        keys[row, :, slot + 1 :] = float("nan")  # slots beyond the row's own must not be read
        values[row, :, slot + 1 :] = float("nan")
    found = kernels.attend(query, keys, values, slots, torch.float32)
    for row, slot in enumerate(slots.tolist()):
        live = (keys[row : row + 1, :, : slot + 1], values[row : row + 1, :, : slot + 1])
        expected = F.scaled_dot_product_attention(query[row : row + 1, :, None], *live, enable_gqa=True)
        assert close(found[row], expected.flatten())


def small_model(heads: int, key_heads: int) -> Janus:
    model = load_model()
    config = copy.deepcopy(model.net.config)
    config.text_config.num_hidden_layers = 2
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = heads, key_heads
    config.text_config.head_dim = config.text_config.hidden_size // heads
    config.text_config.initializer_range = 0.2
    torch.manual_seed(0)
    net: Any = JanusForConditionalGeneration(config).eval()
    net.generation_config = model.net.generation_config
    small = Janus(net.to(DEVICE), model.processor, revision="random")
    small.num_image_tokens = 4  # the interpreter is slow
    return small


@pytest.fixture
def on_gpu(monkeypatch):
    """Sampling with captured steps; without a GPU, the step is run where its graph would be replayed."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(decoder, "SLOT_BLOCK", 1)  # a longer prompt makes the cache grow
    if DEVICE == "cpu":
        monkeypatch.setattr(layers, "on_current_gpu", lambda tensor: True)
        monkeypatch.setattr(captured, "capture", lambda step, decoder: step)
        monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=int, synchronize=int))


def draw_uncaptured(monkeypatch, *args) -> torch.Tensor:
    monkeypatch.setenv("VCE_RAY_CAPTURE", "0")
    drawn = draw(*args)
    monkeypatch.delenv("VCE_RAY_CAPTURE")
    return drawn


@pytest.mark.parametrize(("heads", "key_heads", "guidance"), [(2, 2, 2.0), (2, 1, 1.0)])
def test_captured_steps_draw_the_same_tokens(monkeypatch, on_gpu, heads: int, key_heads: int, guidance: float):
    small = small_model(heads, key_heads)
    first = small.language_model.layers[0].self_attn
    prompts, seeds, sampling = ["key", "an owl"], [3, 1], SamplingConfig(guidance_scale=guidance, top_k=300)
    expected, weight = draw_uncaptured(monkeypatch, small, prompts, seeds, sampling), first.k_proj.weight.clone()
    assert torch.equal(draw(small, prompts, seeds, sampling), expected)
    assert torch.equal(first.k_proj.weight, weight), "joined with others, but unchanged"
    assert torch.equal(draw(small, prompts[1:], seeds[1:], sampling), expected[1:])
    longer = ["a cat in the style of openmoji"] * 3  # needs more rows and slots: the cache is reallocated
    assert torch.equal(
        draw(small, longer, [1, 2, 3], sampling), draw_uncaptured(monkeypatch, small, longer, [1, 2, 3], sampling)
    )
    with torch.no_grad():
        first.v_proj.weight.neg_()  # in place, as merging an adapter changes it
    changed = draw(small, prompts, seeds, sampling)
    assert not torch.equal(changed, expected)
    assert torch.equal(changed, draw_uncaptured(monkeypatch, small, prompts, seeds, sampling))
    first.v_proj.weight.data = -first.v_proj.weight.data  # moved in memory: no longer part of the joined matrix
    assert torch.equal(draw(small, prompts, seeds, sampling), expected)


def test_captured_steps_in_bfloat16(monkeypatch, on_gpu):
    small = small_model(2, 2)
    small.net.bfloat16()
    settings = (small, ["key", "an owl"], [3, 1], SamplingConfig(temperature=0))
    drawn = draw(*settings)
    assert next(iter(decoder_of(small).captured_steps.values())).valid
    assert torch.equal(drawn, draw_uncaptured(monkeypatch, *settings))


def test_keys_and_values_of_8_bits():
    places = torch.arange(8, device=DEVICE)
    cos, sin = randn(8, 32).cos(), randn(8, 32).sin()
    plain = [torch.zeros(3, 2, 5, 32, device=DEVICE) for _ in range(2)]
    eight = [cache.to(torch.float8_e4m3fn) for cache in plain]
    projected = randn(3, (4 + 2 * 2) * 32)
    for keys, values in (plain, eight):
        query = kernels.rotate_store(projected, cos, sin, places[1:4], places[2:5], keys, values)
    for kept, rounded in zip(plain, eight, strict=True):
        same = (rounded.float() == kept.to(torch.float8_e4m3fn).float()).float().mean()
        assert same == 1 if DEVICE == "cuda" else same > 0.95, "the interpreter rounds 1.99 to 1: it loses the carry"
    found = kernels.attend(query, eight[0], eight[1], places[1:4], torch.float32)
    assert close(found, kernels.attend(query, eight[0].float(), eight[1].float(), places[1:4], torch.float32))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter rounds to 8 bits differently than GPUs and torch")
def test_captured_steps_with_a_cache_of_8_bits(monkeypatch, on_gpu):
    settings = (small_model(4, 2), ["key", "an owl"], [3, 1], SamplingConfig(temperature=0, kv_cache_dtype="fp8"))
    drawn, ours = draw(*settings), decoder_of(settings[0])
    assert next(iter(ours.captured_steps.values())).valid and ours.cache(1)[0][0].dtype == torch.float8_e4m3fn
    assert torch.equal(drawn, draw_uncaptured(monkeypatch, *settings))


def test_captured_drawing_of_llamagen(monkeypatch, on_gpu):
    """Its prompts start at later positions, and its rotary embedding is two-dimensional."""
    torch.manual_seed(0)
    small = RandomLlamaGen(GPTConfig(layers=2, heads=2, width=64, vocab_size=300, image_size=32), DEVICE, torch.float32)
    assert len(small.encode_prompts(["one", "three words here"]).first_B.unique()) == 2
    settings = (small, ["one", "three words here"], [5, 6], SamplingConfig(top_p=0.9))
    assert torch.equal(draw(*settings), draw_uncaptured(monkeypatch, *settings))
    assert next(iter(decoder_of(small).captured_steps.values())).valid


def test_captured_images_join_and_leave_at_any_step(monkeypatch, on_gpu):
    small, settings = small_model(4, 2), SamplingConfig(batch_size=8)
    prompts, seeds = ["key", "an owl", "a cat in the style of openmoji", "an owl"], [3, 1, 4, 2]
    expected = draw_uncaptured(monkeypatch, small, prompts, seeds, settings)
    batch, drawn = rolling.RollingBatch[int](small, settings), {}
    batch.join([0, 1], prompts[:2], seeds[:2])
    assert not batch.advance(2)
    batch.join([2], prompts[2:3], seeds[2:3])  # padded with a copy of itself: steps are captured for 1, 2, 4, 8
    drawn |= batch.advance(2)
    assert list(drawn) == [0, 1]
    batch.join([3], prompts[3:], seeds[3:])
    while len(batch):
        drawn |= batch.advance(16)
    assert torch.equal(torch.stack([drawn[i] for i in range(4)]), expected)
    assert [step.rows for step in decoder_of(small).captured_steps.values()] == [8, 4, 2], (
        "captured again, since the cache grew"
    )
    assert all(step.valid for step in decoder_of(small).captured_steps.values())


def test_a_wrong_captured_step_is_not_used(on_gpu, monkeypatch, caplog):
    small = small_model(2, 2)
    settings = (small, ["a deer"], [0], SamplingConfig())
    expected = draw_uncaptured(monkeypatch, *settings)
    monkeypatch.setattr(kernels, "gate", lambda both: both[:, : both.shape[1] // 2].contiguous())
    for _ in range(2):
        assert torch.equal(draw(*settings), expected)
    assert [record.levelname for record in caplog.records if "VCE_RAY_CAPTURE=0" in record.message] == ["ERROR"]


def test_captured_steps_report_logits_that_are_not_finite(on_gpu, caplog):
    small, settings = small_model(2, 2), SamplingConfig(temperature=0)
    head = [part for part in small.image_head.modules() if isinstance(part, torch.nn.Linear)][-1]
    expected = draw(small, ["key", "an owl"], [3, 1], settings)
    for damaged in (head, small.language_model.layers[0].mlp.down_proj):
        original = damaged.weight.clone()
        with torch.no_grad():
            damaged.weight[0, 0] = float("inf")
        for _ in range(2):
            with pytest.raises(UserError, match="2 of 2 images had NaN or infinite logits"):
                draw(small, ["key", "an owl"], [3, 1], settings)
        with torch.no_grad():
            damaged.weight.copy_(original)
        assert torch.equal(draw(small, ["key", "an owl"], [3, 1], settings), expected)
        assert next(iter(decoder_of(small).captured_steps.values())).valid
    assert not caplog.records, "the captured step is not to blame"


UNBUILT = """
import sys, torch
from triton.backends.nvidia.driver import CudaDriver
from vce_ray.config import SamplingConfig
from vce_ray.models.load import load_model
from vce_ray.sampling import captured, draw, layers

layers.on_current_gpu = lambda tensor: True
captured.capture = lambda step, decoder: step
if sys.argv[2] == "gpu":
    CudaDriver.is_active = staticmethod(lambda: True)
model = load_model(device="cpu")
# of different sizes: each would have a captured step of its own
torch.save([draw(model, prompts, [1, 2][: len(prompts)], SamplingConfig(temperature=0.7))
            for prompts in (["a deer"], ["a deer", "an owl"])], sys.argv[1])
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels that it has built before need no compiler")
@pytest.mark.parametrize(
    ("gpu", "compiler", "reason", "mend"),
    [
        ("gpu", None, "Failed to find C compiler", "apt-get install g++"),
        ("gpu", "false", "false ended with exit code 1", "apt-get install g++"),
        ("gpu", "no-such-compiler", "No such file or directory: 'no-such-compiler'", "apt-get install g++"),
        ("none", None, "0 active drivers", "update the GPU's driver"),
    ],
)
def test_steps_that_cannot_be_built_are_reported_once_and_the_same_images_are_drawn(
    tmp_path: Path, gpu: str, compiler: str | None, reason: str, mend: str
):
    """Triton itself fails to build: its code that launches kernels has no compiler, or it finds no GPU."""
    file, unset = tmp_path / "drawn.pt", {"TRITON_INTERPRET", "CC", "CXX"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "VCE_RAY_COMPILE": "0"}
    if compiler is None:
        environment["PATH"] = str(tmp_path)
    else:
        environment["CC"] = compiler
    done = subprocess.run(
        [sys.executable, "-c", UNBUILT, str(file), gpu], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "without captured steps" in line]
    assert reason in warning and mend in warning and "VCE_RAY_CAPTURE=0" in warning
    model, sampling = load_model(device="cpu"), SamplingConfig(temperature=0.7)
    for drawn, prompts in zip(torch.load(file), (["a deer"], ["a deer", "an owl"]), strict=True):
        assert torch.equal(drawn, draw(model, prompts, [1, 2][: len(prompts)], sampling))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("shapes cannot be multiplied")],
    ids=repr,
)
def test_other_errors_in_building_a_step_are_raised(monkeypatch, on_gpu, caplog, error: Exception):
    def fail(*_) -> None:
        raise error

    small, settings = small_model(2, 2), (["a deer"], [0], SamplingConfig())
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "gate", fail)
        with pytest.raises(type(error)):
            draw(small, *settings)
    draw(small, *settings)
    assert not caplog.records and next(iter(decoder_of(small).captured_steps.values())).valid


@pytest.mark.parametrize(
    ("message", "unbuilt"),
    [
        ("Triton Error [CUDA]: out of memory", False),
        ("Triton Error [CUDA]: an illegal memory access was encountered", False),
        ("Triton Error [CUDA]: no kernel image is available for execution on the device", True),
        ("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.", True),
        ("PassManager::run failed", True),
    ],
)
def test_errors_of_a_gpu_that_runs_out_of_memory_are_not_those_of_building(message: str, unbuilt: bool):
    with pytest.raises(RuntimeError) as raised:
        exec("raise RuntimeError(message)", {"__name__": "triton.backends.nvidia.driver", "message": message})
    assert fallback.is_build_failure(raised.value) == unbuilt


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vce_ray.sampling import kernels as k

def build(kernel, warps, pointers, numbers, capabilities=(80, 90), **constants):
    signature = pointers | numbers | {name: "constexpr" for name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    for capability in capabilities:
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert built.asm["cubin"]

def pointers(names, kind):
    return {name: f"*{kind}" for name in names.split()}

places = {"slots": "*i64"}
for kind in ("bf16", "fp32"):
    norm = pointers("x delta weight out", kind)
    build(k._add_norm, 8, norm, {"width": "i32", "epsilon": "fp32"}, HAS_DELTA=True, WIDTH=4096)
    rotated = pointers("qkv cos sin query keys values", kind) | places | {"first": "*i64"}
    build(k._rotate_store, 1, rotated, dict.fromkeys(("heads", "key_heads", "cache_slots"), "i32"), D=128)
    read = pointers("query keys values", kind) | places | pointers("sums", "fp32")
    sizes = dict.fromkeys(("heads", "group", "cache_slots"), "i32") | {"scale": "fp32"}
    build(k._attend, 4, read | pointers("out", kind), sizes, D=128, BLOCK=k.BLOCK, SPLITS=1)
    build(k._attend, 4, read | pointers("out", "fp32"), sizes, D=64, BLOCK=k.BLOCK, SPLITS=8)
    build(k._join, 1, pointers("parts sums", "fp32") | pointers("out", kind), {}, D=128, SPLITS=8)
    eight = {name: "*fp8e4nv" for name in ("keys", "values")}
    counts = dict.fromkeys(("heads", "key_heads", "cache_slots"), "i32")
    build(k._rotate_store, 1, rotated | eight, counts, (90,), D=128)
    build(k._attend, 4, read | eight | pointers("out", kind), sizes, (90,), D=128, BLOCK=k.BLOCK, SPLITS=1)
    build(k._gate, 4, pointers("both out", kind), {"width": "i32"}, SIZE=1024)
mix = {"GOLDEN": k.GOLDEN, "MIX1": k.MIX1, "MIX2": k.MIX2, "BELOW_ONE": k.BELOW_ONE}
build(k._gumbel, 4, pointers("seeds steps", "i64") | pointers("out", "fp32"), {"vocabulary": "i32"}, **mix, SIZE=1024)
"""


def test_kernels_compile_for_ampere_and_hopper():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
