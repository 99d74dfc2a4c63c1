"""vce-ray plan as a user meets it: figures, what does not fit and what does instead, and one line for a bad value."""

from __future__ import annotations

import re

import pytest

from vce_ray.cli.app import main
from vce_ray.devices import CARDS
from vce_ray.models.shape import SHAPES

JANUS_7B = ["--model", "janus-pro-7b"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["plan", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 or captured.out else captured.err


def test_the_arithmetic_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *JANUS_7B, "--device", "h200", "--batch", "64")
    assert "128 rows x 640 slots x 480 KiB = 40.27 GB" in printed
    assert "peak 55.25 of 132.54 GB: fits; up to 186 would" in printed
    assert "at best    6.86 ms per step x 576 tokens = 3.95 s per batch, 16.2 images/s" in printed
    assert "expected   11.19 ms per step, 6.44 s per batch, 9.93 images/s: 1.6 times the limit" in printed
    assert "expected   4.12 s per step: 2.4 times the limit" in printed
    assert "fitted to one H200" in printed
    printed = run(capsys, *JANUS_7B, "--device", "h200", "--batch", "64", "--kv-cache", "fp8")
    assert "128 rows x 640 slots x 240 KiB = 20.13 GB" in printed


def test_a_batch_that_does_not_fit_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *JANUS_7B, "--device", "h200", "--batch", "512", code=2)
    assert "peak 337.37 of 132.54 GB: DOES NOT FIT" in printed
    instead = re.findall(r"instead +(.*)", printed)
    assert instead[:2] == ["--batch 186", "--kv-cache fp8 --batch 349"]
    assert "images/s" not in printed and "a run of" not in printed
    for change in instead[:2]:
        assert "fits" in run(capsys, *JANUS_7B, "--device", "h200", *change.split())
    printed = run(capsys, *JANUS_7B, "--device", "a100-40gb", "--batch", "64", code=2)
    assert "fp8" not in printed and re.search(r"a GPU with \d+\.\d GB: b200, h200, h100, a100-80gb$", printed, re.M)
    assert "DOES NOT FIT" in run(capsys, *JANUS_7B, "--device", "t4", "--dtype", "float16", code=2)


def test_a_training_that_does_not_fit_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "rtx4090"], ["--device", "h100", "--weights", "full"]):
        printed = run(capsys, *JANUS_7B, *arguments, code=2)
        assert "drawing" in printed and "GB per worker: DOES NOT FIT" in printed
        instead = re.findall(r"instead +([^:\n]*?)(?:, which.*)?$", printed, re.MULTILINE)
        assert any("--workers" in change for change in instead)
        for change in instead:
            if change.startswith("--"):
                assert "a run of" in run(capsys, *JANUS_7B, *arguments, *change.split())


def test_by_default_a_run_draws_fewer_images_if_memory_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert "64 images at once" in run(capsys, "--model", "janus-pro-1b", "--device", "h100")
    assert "40 images at once" in run(capsys, "--model", "janus-pro-1b", "--device", "t4", "--dtype", "float16", code=2)


def test_float32_is_planned_with_the_speed_of_float32(capsys: pytest.CaptureFixture[str]) -> None:
    assert "82.6 Tflop/s in float32 (by its data sheet)" in run(capsys, "--device", "rtx4090")
    assert "165 Tflop/s in bfloat16" in run(capsys, "--device", "rtx4090", "--dtype", "bfloat16")


def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--pairs", "64")
    assert re.search(r"emoji-world in float32 on .*\(measured\)", printed) and "64 images of the concept" in printed


def test_a_run_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "van_gogh", *JANUS_7B, "--device", "h200", "--gpus", "4", "--price", "3", "--judged", "100")
    assert "a run of van_gogh on 4 GPUs" in printed and "192 images of the concept, 1280 to keep" in printed
    assert "1800 images, half of them before" in printed
    hours, cost = (
        [float(value) for value in re.search(rf"{name} +(\S+) +(\S+)", printed).groups()]  # pyright: ignore
        for name in ("GPU-hours", "cost")
    )
    assert cost == pytest.approx([3 * value for value in hours], abs=0.02) and 0 < hours[0] < hours[1]
    assert "cost" not in run(capsys, *JANUS_7B, "--device", "h200")


def test_known_models_and_gpus_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--list")
    for name in [*SHAPES, *CARDS]:
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    assert re.search(r"^t4 .* 16 GB .*0.32 TB/s .* 65 Tflop/s .* 8.1 Tflop/s .*no bfloat16", printed, re.MULTILINE)
    assert {"l4", "a10g", "t4", "b200"} < set(CARDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h2000"], "unknown device 'h2000': known are this, b200, h200,"),
        (["--model", "janus-pro-9b"], "unknown base model 'janus-pro-9b'.* janus-pro-1b, janus-pro-7b"),
        (["--batch", "0"], "--batch 0: give 1 or more"),
        (["--gpus", "0"], "--gpus 0: give 1 or more"),
        (["--price", "-1"], "--price -1: give 0 or more"),
        (["--price", "nan"], "--price nan: give 0 or more"),
        ([*JANUS_7B, "--device", "a100-80gb", "--kv-cache", "fp8"], r"8\.9 or more .*l4\), and a100-80gb has 8\.0"),
        ([*JANUS_7B, "--device", "t4"], r"bfloat16 needs .*t4 has 7\.5: save the model in float16 or float32"),
        ([*JANUS_7B, "--device", "h200", "--workers", "4", "--gpus", "2"], "4 --workers need as many GPUs"),
        (["dear"], "unknown concept 'dear'"),
    ],
)
def test_bad_values_are_named_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and re.search(message, captured.err) and not captured.out
