"""The plan of a batch against arithmetic done by hand, and against what drawing really takes."""

from __future__ import annotations

import pytest
import torch

from vce_ray.cli.app import main
from vce_ray.config import SamplingConfig
from vce_ray.models.load import load_model
from vce_ray.sampling import draw, rolling
from vce_ray.sampling.device import free_memory, measure_device
from vce_ray.sampling.plan import DEVICES, SHAPES, Device, Shape, fitting_batch, plan

TINY = Shape("tiny", 2, 8, 2, 1, 16, 100, 10, 50, 1000, prompt_tokens=5, dtype="float32")
"""A head of width 4, one of keys and values for two of queries."""


def test_a_plan_by_hand() -> None:
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8  # queries and output, keys and values, feed-forward, norms
    assert TINY.step_parameters == 2 * layer + 50
    assert TINY.cache_bytes == 2 * 2 * 4 * 4
    found = plan(TINY, Device("slow", 1e6, bandwidth=1000.0, arithmetic=1e9), batch=3)
    assert (found.batch, found.rows) == (3, 6)
    assert found.cache_bytes == 6 * 14 * TINY.cache_bytes
    assert found.step_s == pytest.approx((TINY.step_parameters * 4 + 6 * 9.5 * TINY.cache_bytes) / 1000)
    assert found.batch_s == pytest.approx(10 * found.step_s)
    assert found.bound == "reading the weights"
    assert plan(TINY, Device("dull", 1e6, 1e9, arithmetic=1e3), batch=3).bound == "matrix products"
    assert plan(TINY, Device("slow", 1e6, 1000.0, 1e9), batch=3, guided=False).rows == 3


def test_released_shapes_have_the_published_sizes() -> None:
    """Janus-Pro-1B and -7B hold 2.1 and 7.4 thousand million weights, of which a step reads 1.27 and 6.17."""
    for name, step, total in (("janus-pro-1b", 1.275e9, 2.09e9), ("janus-pro-7b", 6.172e9, 7.42e9)):
        shape = SHAPES[name]
        assert shape.step_parameters == pytest.approx(step, rel=0.01)
        assert shape.step_parameters + shape.idle_parameters == pytest.approx(total, rel=0.03)
    assert SHAPES["janus-pro-7b"].cache_bytes == 480 * 1024
    assert SHAPES["llamagen-xl-256"].step_parameters == pytest.approx(0.752e9, rel=0.01)


def test_the_batch_fits_and_one_more_would_not() -> None:
    shape, card = SHAPES["janus-pro-7b"], DEVICES["rtx4090"]
    batch = fitting_batch(shape, card.memory, guided=True)
    assert plan(shape, card, batch).peak_bytes <= card.memory * 0.94 < plan(shape, card, batch + 1).peak_bytes
    assert plan(shape, card).batch <= batch
    assert fitting_batch(shape, float("inf"), guided=True) > 10**6  # where a system does not tell its memory
    with pytest.raises(ValueError, match=r"janus-pro-7b needs 16\.\d GB for one picture, small has less"):
        plan(shape, Device("small", 8e9, 1e12, 1e14))


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
    assert model.decoder.cache_bytes == 3 * 2 * (prompt + 63) * model.shape.cache_bytes


def test_short_memory_makes_smaller_batches_and_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(device="cpu")
    prompts, seeds = ["a deer", "a house on a red background"] * 2, [1, 2, 3, 4]
    wide = draw(model, prompts, seeds, SamplingConfig())
    rows: list[int] = []
    join = model.decoder.join
    monkeypatch.setattr(rolling, "free_memory", lambda device: 4e6)
    monkeypatch.setattr(model.decoder, "_keys", [])
    monkeypatch.setattr(model.decoder, "_values", [])
    monkeypatch.setattr(model.decoder, "join", lambda *args: rows.append(len(args[3])) or join(*args))
    assert torch.equal(draw(model, prompts, seeds, SamplingConfig()), wide)
    assert len(rows) > 1 and max(rows) < 8


def test_long_prompts_have_room_for_fewer_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(device="cpu")
    held = [plan(model.shape, Device("", 1e12, 1, 1), batch).peak_bytes for batch in (0, 4)]
    memory = (held[1] - held[0]) * 1.1
    monkeypatch.setattr(rolling, "free_memory", lambda device: memory - model.decoder.cache_bytes)
    batch = rolling.RollingBatch[int](model, SamplingConfig(batch_size=16))
    short, long = ["a deer"] * 8, ["a deer " * 40] * 8
    assert batch.join(range(8), short, range(8)) == 4
    batch.advance(3)
    batch.drop([0, 1])
    assert batch.join(range(8, 16), long, range(8)) == 0
    batch.drop([2])
    assert batch.join(range(8, 16), long, range(8)) == 1
    assert batch.join(range(16, 24), short, range(8)) == 0, "their rows would be as long"
    slots = model.decoder.slots
    batch.drop([3, 8])
    assert batch.join(range(8), short, range(8)) == 4 and model.decoder.slots < slots, "the long rows were given back"


def test_the_device_at_hand_is_measured() -> None:
    cpu = torch.device("cpu")
    found = measure_device(cpu)
    assert 1e9 < found.bandwidth < 1e12
    assert 1e9 < found.arithmetic < 1e14
    assert 0 < free_memory(cpu) == pytest.approx(found.memory, rel=0.2)


def test_the_command_shows_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "janus-pro-7b", "--device", "h200", "--batch", "64"]) == 0
    told = capsys.readouterr().out
    assert "128 rows x 640 slots x 480 KiB = 40.27 GB" in told
    assert "6.86 ms a step x 576 tokens = 3.95 s a batch, 16.20 pictures/s" in told
    assert main(["plan", "--model", "janus-pro-7b", "--device", "h200", "--batch", "64", "--kv-cache", "fp8"]) == 0
    assert "128 rows x 640 slots x 240 KiB = 20.13 GB" in capsys.readouterr().out
    assert main(["plan", "--device", "h2000"]) == 2
    assert "unknown device 'h2000'" in capsys.readouterr().err
