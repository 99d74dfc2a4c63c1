"""The plan of a batch against arithmetic by hand, published sizes and measured steps."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate, chain, repeat
from pathlib import Path

import pytest
import torch
from tiny_shape import TINY

from vce_ray.devices import CARDS, Device
from vce_ray.errors import UserError
from vce_ray.models.load import load_model
from vce_ray.models.shape import SHAPES
from vce_ray.sampling.measure import measure_device
from vce_ray.sampling.memory import check_cache_dtype, fitting_batch
from vce_ray.sampling.plan import (
    OVERHEADS,
    TEXT_OVERHEADS,
    USEFUL_SHARE,
    needed_memory,
    plan,
    slot_block,
    useful_batch,
)

RESULTS = Path(__file__).parents[2] / "docs/results"


def test_a_plan_by_hand() -> None:
    planned = plan(TINY, Device("slow", 1e6, bandwidth=1000.0, arithmetic=1e9), batch=3)
    assert (planned.batch, planned.rows) == (3, 6)
    assert planned.cache_bytes == 6 * 14 * TINY.cache_bytes
    assert planned.step_s == pytest.approx((TINY.step_parameters * 4 + 6 * 9.5 * TINY.cache_bytes) / 1000)
    assert planned.batch_s == pytest.approx(10 * planned.step_s)
    assert planned.expected_step_s == pytest.approx(1.7 * planned.step_s + 2 * 240e-6)
    assert planned.bound == "reading the weights"
    assert plan(TINY, Device("weak", 1e6, 1e9, arithmetic=1e3), batch=3).bound == "matrix products"
    assert plan(TINY, Device("slow", 1e6, 1000.0, 1e9), batch=3, guided=False).rows == 3


def test_released_shapes_have_the_published_sizes() -> None:
    """Janus-Pro-1B and -7B have 2.1 and 7.4 billion weights, of which a step reads 1.27 and 6.17 billion."""
    for name, step, total in (("janus-pro-1b", 1.275e9, 2.09e9), ("janus-pro-7b", 6.172e9, 7.42e9)):
        shape = SHAPES[name]
        assert shape.step_parameters == pytest.approx(step, rel=0.01)
        assert shape.step_parameters + shape.idle_parameters == pytest.approx(total, rel=0.03)
    assert SHAPES["janus-pro-7b"].cache_bytes == 480 * 1024
    assert SHAPES["llamagen-xl-256"].step_parameters == pytest.approx(0.752e9, rel=0.01)


def test_whether_a_batch_fits() -> None:
    shape, device = SHAPES["janus-pro-7b"], CARDS["h200"].device("bfloat16")
    largest = fitting_batch(shape, device.memory, guided=True, slot_block=slot_block(device))
    for batch, fits in ((1, True), (largest, True), (largest + 1, False), (512, False)):
        planned = plan(shape, device, batch)
        assert (planned.fits, planned.largest) == (fits, largest)
        assert (planned.peak_bytes <= device.usable) == fits
    assert plan(replace(shape, dtype="float16"), CARDS["t4"].device("float16"), 1).largest == 0
    assert fitting_batch(shape, needed_memory(shape) * 0.9999, guided=True) == 0
    assert fitting_batch(shape, needed_memory(shape) * 1.0001, guided=True) == 1
    assert fitting_batch(shape, needed_memory(shape, batch=7) * 1.0001, guided=True) == 7


def test_the_useful_batch_is_the_smallest_one() -> None:
    shape, device = SHAPES["janus-pro-1b"], CARDS["h200"].device("bfloat16")
    useful, highest = useful_batch(shape, device), plan(shape, device, 1 << 20).images_per_s
    assert plan(shape, device, useful - 1).images_per_s <= USEFUL_SHARE * highest
    assert plan(shape, device, useful).images_per_s > USEFUL_SHARE * highest


def test_the_arithmetic_is_that_of_the_dtype() -> None:
    """Float32 products are computed in float32, because nothing turns TF32 on."""
    embedded = load_model(device="cpu").shape
    assert embedded.dtype == "float32" and torch.get_float32_matmul_precision() == "highest"
    card = CARDS["rtx4090"]
    assert card.device("float32").arithmetic == card.single == 82.6e12
    assert card.device("bfloat16").arithmetic == card.device("float16").arithmetic == card.half == 165e12
    assert not torch.backends.cuda.matmul.allow_tf32


def test_dtypes_that_a_gpu_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["janus-pro-1b"]
    with pytest.raises(UserError, match=r"in bfloat16 needs .* 8\.0 or more .*l4\), and t4 has 7\.5.*float16 or float"):
        plan(shape, CARDS["t4"].device("bfloat16"), 1)
    for dtype in ("float16", "float32"):
        plan(replace(shape, dtype=dtype), CARDS["t4"].device(dtype), 1)
    in_fp8 = replace(shape, kv_cache_dtype="fp8")
    for name, card in CARDS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, card=card: card.capability)
        refused = name in ("a100-80gb", "a100-40gb", "a10g", "t4")
        for attempt in (
            lambda card=card: plan(replace(in_fp8, dtype="float16"), card.device("float16"), 1),
            lambda: check_cache_dtype("fp8", torch.device("cuda")),  # what sampling does on that GPU
        ):
            if refused:
                with pytest.raises(UserError, match=r"fp8 needs a GPU of compute capability 8\.9 or more"):
                    attempt()
            else:
                attempt()
    assert plan(in_fp8, Device("a CPU", 64e9, 1e11, 1e12), 1).fits


def test_expected_steps_are_close_to_measured_ones() -> None:
    """The figures are those of docs/decoder.md. By data sheet and by what was measured of the same GPU."""
    compared = 0
    for run in json.loads((RESULTS / "decode_gpu.json").read_text())["runs"]:
        machine = run["machine"]
        measured = Device("H200", 141e9, machine["bandwidth"], machine["arithmetic"], kind="gpu", capability=(9, 0))
        for row in run["rows"]:
            shape = replace(
                SHAPES[str(row["model"]).replace("llamagen-xl", "llamagen-xl-256")], kv_cache_dtype=row["kv_cache"]
            )
            for device in (CARDS["h200"].device("bfloat16"), measured):
                planned = plan(shape, device, row["batch"])
                assert 1e3 * planned.step_s < row["ms_per_step"], "the limit cannot be beaten"
                assert 1e3 * planned.expected_step_s == pytest.approx(row["ms_per_step"], rel=0.16), row
                if "times_transformers" in row and row["kv_cache"] == "auto":
                    theirs = row["ms_per_step"] * row["times_transformers"]
                    step_s = TEXT_OVERHEADS[device.kind].step_s(planned.step_s, shape.layers)
                    assert 1e3 * step_s == pytest.approx(theirs, rel=0.16), row
                compared += 1
    assert compared == 20
    cpu = json.loads((RESULTS / "decode_cpu.json").read_text())
    for row, layers in zip(cpu["rows"], (6, 4), strict=True):
        limit_s, step_s = row["share_of_limit"] * row["ms_per_step"] / 1e3, row["ms_per_step"] / 1e3
        assert OVERHEADS["cpu"].step_s(limit_s, layers) == pytest.approx(step_s, rel=0.05)
        theirs = step_s * row["times_transformers"]
        assert TEXT_OVERHEADS["cpu"].step_s(limit_s, layers) == pytest.approx(theirs, rel=0.05)


def test_a_device_is_measured_by_its_fastest_round() -> None:
    rounds = chain([3.0, 0.5, 2.0], repeat(1.0))  # seconds
    times = accumulate(chain.from_iterable((0.0, seconds) for seconds in rounds))
    measured = measure_device(torch.device("cpu"), torch.bfloat16, clock=lambda: next(times))
    assert measured.bandwidth == (1 << 28) / 0.5
    assert measured.arithmetic == 2 * 2048**3 / 1.0
    assert (measured.packs, measured.kind) == (False, "cpu") and measured.supports("bfloat16", "fp8")
