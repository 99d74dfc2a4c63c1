"""LlamaGen's caption cleaning: the same text as its authors' code gives."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vce_ray.models.llamagen.captions import clean_caption

CAPTIONS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "data/llamagen_captions.jsonl").read_text().splitlines()
]
"""Captions of our own, and what the rules of language/t5.py of github.com/FoundationVision/LlamaGen make of them by
ftfy 6.3.1 and beautifulsoup4 4.15.0."""


def test_captions_are_cleaned_as_the_authors_clean_them() -> None:
    assert len(CAPTIONS) >= 200 and sum(caption.strip().lower() != clean for caption, clean in CAPTIONS) > 150
    wrong = [(caption, clean_caption(caption), clean) for caption, clean in CAPTIONS if clean_caption(caption) != clean]
    assert not wrong


@pytest.mark.parametrize(
    "unit", ["a.", "-a", "1.1.", "a1", "<a", "<a>", "&amp;", "@", "www:a", "0x0", '"', "\n :", " "]
)
def test_no_text_takes_long_to_clean(unit: str) -> None:
    start = time.process_time()
    clean_caption(unit * (2000 // len(unit)))
    assert time.process_time() - start < 1
