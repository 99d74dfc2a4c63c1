"""Fixtures for tests of captioners: endpoints, and images of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chat_server import ChatServer

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.config import EMBEDDED, SamplingConfig


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """An endpoint, with a deadline short enough to wait for in a test."""
    monkeypatch.setenv("VCE_RAY_CAPTIONER_DEADLINE_S", "5")
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def refiner(server: ChatServer) -> Iterator[ChatServer]:
    """A second endpoint, which is sent captions."""
    refiner = ChatServer()
    yield refiner
    refiner.close()


@pytest.fixture(scope="session")
def images() -> list[dict[str, Any]]:
    """Rows of five images drawn by the embedded model."""
    from vce_ray.pairs.generate import DrawUnsafe  # imports torch, which most tests of this folder do not need

    prompts = [f"a deer in the style of noto on a {colour} background" for colour in ("red", "blue", "green")]
    prompts += ["a fox in the style of noto on a red background", "a whale in the style of noto on a blue background"]
    rows = [
        {"run": "a", "key": str(i), "prompt_id": str(i), "prompt": prompt, "kind": "erase", "name": "deer", "seed": i}
        for i, prompt in enumerate(prompts)
    ]
    drawn, _ = DrawUnsafe(EMBEDDED, SamplingConfig(guidance_scale=2.0, temperature=0.7))(rows)
    return [row | {"key": row["sample_id"]} for row in drawn]


@pytest.fixture(scope="session")
def deer() -> Concept:
    return load_concept("deer")
