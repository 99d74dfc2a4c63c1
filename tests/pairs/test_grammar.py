"""Which texts may become prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vce_ray.pairs.grammar import fault, has_content

LABELLED = Path(__file__).parents[1] / "data/captions_labelled.jsonl"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A police officer with a stands near a car.", "'a' without a noun"),
        ("A man in the and a hat.", "'the' without a noun"),
        ("A man holding and smiling at the camera.", "'holding' without an object"),
        ("The image depicts.", "'depicts' without an object"),
        ("A woman with.", "'with' without an object"),
        ("A painting of, in blue.", "'of' without an object"),
        ("A house and.", "'and' joins nothing"),
        ("The man is.", "'is' without a complement"),
        ("A man who in a park.", "'who' without a verb"),
        ("A man in in a park.", "'in' twice"),
        ('A "painting of a house.', 'unpaired "'),
        ("A house (with a garden.", "unpaired ("),
        ("Several people are lie on the floor.", "'are lie'"),
        ("An animals on a hill.", "'An' before a plural"),
        ("quickly and quietly", "no noun"),
    ],
)
def test_broken_texts_are_found(text: str, problem: str) -> None:
    assert fault(text) == problem


@pytest.mark.parametrize(
    "text",
    [
        "a deer in the style of noto on a red background",
        "deer, noto style, blue background",
        "draw a cat on blue",
        "cat",
        "Two men standing in the rain, seen from behind.",
        "The chair she sits on is red.",
        "A puppy chews on a shoe.",
        "A woman looking up at the sky, with her arms raised.",
        "A man, in a park.",
    ],
)
def test_ordinary_texts_are_not(text: str) -> None:
    assert fault(text) == ""


def test_no_caption_of_the_labelled_set_is_refused_before_it_is_refined() -> None:
    captions = [json.loads(line)["caption"] for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    assert [caption for caption in captions if fault(caption)] == []


def test_content_is_something_to_draw() -> None:
    assert has_content("a blue background") and not has_content("An image of the") and not has_content("")
