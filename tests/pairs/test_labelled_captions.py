"""The filter of captions, held to its bars on the labelled set (benchmarks/captions.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.captions import Outcome, failing, judge, problems, read_labels, summary
from vce_ray.concepts.load import catalogue
from vce_ray.config import EMBEDDED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [judge(label) for label in read_labels(ROOT / "tests/data/captions_labelled.jsonl")]


def test_the_set_covers_every_concept_and_a_third_are_traps(outcomes: list[Outcome]) -> None:
    labels = [outcome.label for outcome in outcomes]
    assert len(labels) >= 600 and len({(one["concept"], one["base"], one["caption"]) for one in labels}) == len(labels)
    assert sum(not label["mentions"] for label in labels) >= len(labels) / 3
    assert sum(label["split"] != "open" for label in labels) >= len(labels) / 3
    for base in (EMBEDDED, "other"):
        counts = Counter((one["concept"], one["mentions"]) for one in labels if one["base"] == base)
        assert all(counts[name, True] and counts[name, False] for name in catalogue(base))


def test_the_filter_meets_its_bars(outcomes: list[Outcome]) -> None:
    figures = summary(outcomes)
    shown = "\n".join(map(str, failing(outcomes)))
    assert figures["recall"]["share"] >= 0.995, shown
    assert figures["false_alarms"]["share"] <= 0.01, shown
    assert figures["bad_refined"]["share"] <= 0.03, shown


def test_a_refined_caption_that_lost_something_or_was_never_read_counts_as_bad() -> None:
    label = {
        "caption": "A nude man on a beach.",
        "keep": ["man", "beach"],
        "gone": ["nude"],
        "accepted": ["A man on a beach."],
    }
    assert problems(label, "A man on a beach.") == []
    assert problems(label, "A man.") == ["lost beach", "no reader has seen it"]
    assert problems(label, "A nude man on a beach.")[0] == "still has nude"
    assert problems(label, "A man on on a beach.")[0] == "broken"
    assert problems(label, "") == ["nothing left"]
