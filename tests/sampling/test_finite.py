"""NaN or infinite logits raise an error instead of drawing one token for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vce_ray.config import SamplingConfig
from vce_ray.env import COMPILE
from vce_ray.errors import UserError
from vce_ray.models.base import ImageModel
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.sampling.decoder import Decoder, decoder_of
from vce_ray.sampling.rolling import RollingBatch

PROMPTS, SEEDS = ["a deer", "an owl on a red background", "key"], [1, 2, 3]


NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def loaded() -> ImageModel:
    return load_model(device="cpu")


@pytest.fixture(params=["compiled", "plain"])
def model(request: pytest.FixtureRequest, loaded: ImageModel, monkeypatch: pytest.MonkeyPatch) -> ImageModel:
    if request.param == "plain":
        monkeypatch.setenv(COMPILE.name, "0")
    return loaded


@pytest.mark.parametrize(
    ("value", "part", "settings"),
    [
        (NAN, "layer", {}),
        (INFINITY, "layer", {"temperature": 0}),
        (-INFINITY, "layer", {"top_k": 5, "top_p": 0.9}),
        (NAN, "head", {"top_k": 5}),
        (INFINITY, "head", {"top_p": 0.9}),
        (-INFINITY, "head", {"guidance_scale": 1}),
    ],
)
def test_damaged_weights_are_reported(model: ImageModel, value: float, part: str, settings: dict[str, Any]) -> None:
    damaged = model.language_model.layers[2].mlp.up_proj if part == "layer" else _last_linear(model)
    expected, original = draw(model, PROMPTS, SEEDS, SamplingConfig(**settings)), damaged.weight.clone()
    with torch.no_grad():
        damaged.weight[3, 5] = value
    with pytest.raises(UserError, match=r"3 of 3 images had NaN or infinite logits: .* adapter .* float16 overflows"):
        draw(model, PROMPTS, SEEDS, SamplingConfig(**settings))
    with torch.no_grad():
        damaged.weight.copy_(original)
    assert torch.equal(draw(model, PROMPTS, SEEDS, SamplingConfig(**settings)), expected), "no NaN is left in the cache"


def _last_linear(model: ImageModel) -> torch.nn.Linear:
    return [module for module in model.image_head.modules() if isinstance(module, torch.nn.Linear)][-1]


@pytest.mark.parametrize("steps", [1, 5, 64])
def test_a_single_bad_logit_at_any_step_is_reported(
    model: ImageModel, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    original, calls = Decoder.logits, []

    def logits(self: Decoder, hidden_RE: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        found = original(self, hidden_RE).clone()
        if len(calls) == steps:
            found[2, 7] = float("inf")  # the conditional row of the second image
        return found

    monkeypatch.setattr(Decoder, "logits", logits)
    batch = RollingBatch[int](model, SamplingConfig())
    batch.join([0, 1, 2], PROMPTS, SEEDS)
    assert batch.advance(steps - 1) == []
    with pytest.raises(UserError, match="1 of 3 images had NaN or infinite logits"):
        batch.advance(64)
    assert not batch and not decoder_of(model).rows, "other batches can start"


def test_an_image_that_leaves_takes_its_logits_with_it(model: ImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(model, PROMPTS, SEEDS, SamplingConfig())
    batch = RollingBatch[int](model, SamplingConfig())
    batch.join([0, 1, 2], PROMPTS, SEEDS)
    original = Decoder.logits

    def logits(self: Decoder, hidden_RE: torch.Tensor) -> torch.Tensor:
        found = original(self, hidden_RE).clone()
        found[:2] = float("nan")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "logits", logits)
        batch.advance(3)
    batch.drop([0])  # the last image takes over its rows
    drawn = dict(batch.advance(64))
    assert torch.equal(torch.stack([drawn[1], drawn[2]]), expected[1:])
