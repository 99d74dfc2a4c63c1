"""Validation of concepts built in code, and how their terms are found in text."""

from __future__ import annotations

import pytest

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept


def test_a_template_cannot_be_in_both_lists():
    with pytest.raises(ValueError, match="in both templates and held_out_templates"):
        Concept(name="x", kind="object", names=("owl",), templates=("a {name}",), held_out_templates=("a {name}",))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a deer", ("deer",)),
        ("DEER, stags and Does", ("deer", "stag", "doe")),
        ("the deer's antlers", ("deer", "antler")),
        ("the stag\u2019s head, a deer-like thing", ("stag", "deer")),
        ("a dear reindeer-free hearth", ("reindeer",)),
        ("a hart_emoji", ("hart",)),
        ("deerskin, staggering, doer, 4deer", ()),
        ("", ()),
    ],
)
def test_mentions_finds_whole_words(text: str, found: tuple[str, ...]):
    assert load_concept("deer").mentions(text) == found


def test_mentions_prefers_the_longest_term_and_allows_any_gap():
    concept = load_concept("van_gogh", "some/model")
    assert concept.mentions("by Vincent van Gogh") == ("Vincent van Gogh",)
    assert concept.mentions("VAN-GOGH and van  gogh") == ("Van Gogh",)
    assert concept.mentions("a van and a starry sky") == ()
    knife = load_concept("violence")
    assert knife.mentions("two knives, axes, bloody") == ("knife", "axe", "bloody")
