"""One batch of a model at a time: other batches are refused until it ends, however it ends."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vce_ray.config import SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.base import ImageModel
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.sampling.decoder import Decoder, decoder_of
from vce_ray.sampling.rolling import RollingBatch

PROMPTS, SEEDS = ["a deer", "an owl on a red background"], [1, 2]
SETTINGS = SamplingConfig(batch_size=4)
REFUSED = "serves one batch at a time.*finish that one or drop its images first, or load the model twice"


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return load_model(device="cpu")


@pytest.fixture(scope="module")
def expected(model: ImageModel) -> torch.Tensor:
    return draw(model, PROMPTS, SEEDS, SETTINGS)


def started(model: ImageModel, steps: int = 3) -> RollingBatch[int]:
    """Return a batch with images in progress."""
    batch = RollingBatch[int](model, SETTINGS)
    batch.join([0, 1], PROMPTS, SEEDS)
    batch.advance(steps)
    return batch


def check_finishes(batch: RollingBatch[int], expected: torch.Tensor) -> None:
    drawn = {}
    while batch:
        drawn |= batch.advance(16)
    assert torch.equal(torch.stack([drawn[0], drawn[1]]), expected)


def test_a_second_batch_is_refused_and_disturbs_nothing(model: ImageModel, expected: torch.Tensor) -> None:
    first = started(model)
    second = RollingBatch[int](model, SETTINGS)  # making one is allowed
    for _ in range(2):
        with pytest.raises(RuntimeError, match=REFUSED):
            second.join([0], PROMPTS[:1], SEEDS[:1])
        with pytest.raises(RuntimeError, match=REFUSED):
            draw(model, PROMPTS, SEEDS, SETTINGS)
    second.drop([0])
    del second
    check_finishes(first, expected)
    assert torch.equal(draw(model, PROMPTS, SEEDS, SETTINGS), expected), "nothing is in progress any more"


def test_batches_may_alternate_between_their_images(model: ImageModel, expected: torch.Tensor) -> None:
    first, second = started(model), RollingBatch[int](model, SETTINGS)
    first.drop([0, 1])
    second.join([0, 1], PROMPTS, SEEDS)
    with pytest.raises(RuntimeError, match=REFUSED):
        first.join([0], PROMPTS[:1], SEEDS[:1])
    first.drop([0, 1])
    check_finishes(second, expected)
    assert first.join([0, 1], PROMPTS, SEEDS) == 2
    check_finishes(first, expected)


def test_two_models_draw_at_once(model: ImageModel, expected: torch.Tensor) -> None:
    other = load_model(device="cpu")
    first, second = started(model), started(other, 9)
    check_finishes(first, expected)
    check_finishes(second, expected)


def test_a_batch_that_was_dropped_half_way_blocks_no_other(model: ImageModel, expected: torch.Tensor) -> None:
    batch = started(model)
    del batch
    gc.collect()
    assert decoder_of(model).rows, "left by the batch"
    assert torch.equal(draw(model, PROMPTS, SEEDS, SETTINGS), expected)


@pytest.mark.parametrize("method", ["step", "_reserve", "keep", "prepare"])
def test_a_batch_that_fails_blocks_no_other(
    model: ImageModel, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError) as failure:
        patch.setattr(Decoder, method, fail)
        draw(model, PROMPTS, SEEDS, SETTINGS)
    assert failure.tb, "its frames keep the batch alive"
    assert torch.equal(draw(model, PROMPTS, SEEDS, SETTINGS), expected)


def test_a_prompt_that_is_refused_disturbs_nothing(model: ImageModel, expected: torch.Tensor) -> None:
    batch = RollingBatch[int](model, SETTINGS)
    with pytest.raises(UserError, match="empty prompt"):
        batch.join([0], [" "], [1])
    assert batch.join([], [], []) == 0
    other = started(model)
    with pytest.raises(UserError, match="empty prompt"):
        other.join([2], [" "], [1])
    check_finishes(other, expected)


def test_images_are_dropped_if_more_join_only_half_way(
    model: ImageModel, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = started(model)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Decoder, "cache", lambda *_: (_ for _ in ()).throw(MemoryError()))
        batch.join([2], PROMPTS[:1], [3])
    assert not batch, "the decoder had rows already that no image had"
    assert torch.equal(draw(model, PROMPTS, SEEDS, SETTINGS), expected)


def test_of_threads_that_draw_at_once_one_draws(model: ImageModel, expected: torch.Tensor) -> None:
    threads, attempts = 4, 6
    barrier = threading.Barrier(threads)

    def attempt() -> torch.Tensor | RuntimeError:
        barrier.wait(60)
        try:
            return draw(model, PROMPTS, SEEDS, SETTINGS)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(attempts):
            results = [future.result(60) for future in [pool.submit(attempt) for _ in range(threads)]]
            drawn = [result for result in results if isinstance(result, torch.Tensor)]
            assert drawn and all(torch.equal(tokens, expected) for tokens in drawn)
            assert all("one batch at a time" in str(result) for result in results if isinstance(result, RuntimeError))


def test_threads_share_the_decoder_of_a_new_model() -> None:
    model, barrier = load_model(device="cpu"), threading.Barrier(8)

    def find(_: int) -> Decoder:
        barrier.wait(60)
        return decoder_of(model)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(find, range(8)))) == 1
