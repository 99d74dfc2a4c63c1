"""The plan of a batch against arithmetic by hand and published sizes, and the command that prints it."""

from __future__ import annotations

from itertools import accumulate, chain, repeat

import pytest
import torch
from tiny_shape import TINY

from vce_ray.cli.app import main
from vce_ray.sampling.memory import fitting_batch
from vce_ray.sampling.plan import DEVICES, SHAPES, USEFUL_SHARE, Device, measure_device, needed_memory, plan


def test_a_plan_by_hand() -> None:
    planned = plan(TINY, Device("slow", 1e6, bandwidth=1000.0, arithmetic=1e9), batch=3)
    assert (planned.batch, planned.rows) == (3, 6)
    assert planned.cache_bytes == 6 * 14 * TINY.cache_bytes
    assert planned.step_s == pytest.approx((TINY.step_parameters * 4 + 6 * 9.5 * TINY.cache_bytes) / 1000)
    assert planned.batch_s == pytest.approx(10 * planned.step_s)
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


def test_the_default_batch_is_the_smallest_useful_one_or_the_largest_that_fits() -> None:
    shape, large, small = SHAPES["janus-pro-1b"], DEVICES["h200"], DEVICES["rtx4090"]
    useful = plan(shape, large)
    limit = plan(shape, large, 1 << 20).images_per_s
    assert plan(shape, large, useful.batch - 1).images_per_s <= USEFUL_SHARE * limit < useful.images_per_s
    assert useful.batch < fitting_batch(shape, large.memory, guided=True, slot_block=large.slot_block)
    shape = SHAPES["janus-pro-7b"]
    assert plan(shape, small).batch == fitting_batch(shape, small.memory, guided=True, slot_block=small.slot_block)


def test_a_device_without_room_for_one_image_is_refused() -> None:
    shape = SHAPES["janus-pro-7b"]
    with pytest.raises(ValueError, match=r"janus-pro-7b needs 16\.\d GB for one image, small has less"):
        plan(shape, Device("small", 8e9, 1e12, 1e14))
    assert fitting_batch(shape, needed_memory(shape) * 0.9999, guided=True) == 0
    assert fitting_batch(shape, needed_memory(shape) * 1.0001, guided=True) == 1


def test_a_device_is_measured_by_its_fastest_round() -> None:
    rounds = chain([3.0, 0.5, 2.0], repeat(1.0))  # seconds
    times = accumulate(chain.from_iterable((0.0, seconds) for seconds in rounds))
    measured = measure_device(torch.device("cpu"), torch.bfloat16, clock=lambda: next(times))
    assert measured.bandwidth == (1 << 28) / 0.5
    assert measured.arithmetic == 2 * 2048**3 / 1.0
    assert (measured.packs, measured.slot_block) == (False, 1)


def test_the_command_shows_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "janus-pro-7b", "--device", "h200", "--batch", "64"]) == 0
    printed = capsys.readouterr().out
    assert "128 rows x 640 slots x 480 KiB = 40.27 GB" in printed
    assert "6.86 ms per step x 576 tokens = 3.95 s per batch, 16.20 images/s" in printed
    assert main(["plan", "--model", "janus-pro-7b", "--device", "h200", "--batch", "64", "--kv-cache", "fp8"]) == 0
    assert "128 rows x 640 slots x 240 KiB = 20.13 GB" in capsys.readouterr().out
    assert main(["plan", "--device", "h2000"]) == 2
    assert "unknown device 'h2000'" in capsys.readouterr().err
