"""Prompts: balance, determinism, disjoint seeds of training and evaluation, and a user's own prompts file."""

from __future__ import annotations

from collections import Counter

import pytest

from tools.emoji_world import world
from vce_ray.concepts.concept import SLOT
from vce_ray.concepts.load import catalogue, load_concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.config import EMBEDDED
from vce_ray.pairs.prompts import Prompt, erase_prompts, given_prompts, keep_prompts

ALL = [(base, name) for base in (EMBEDDED, "some/model") for name in catalogue(base)]
WORLD = {
    fix_articles(world.fill(template, noun, style, background)): (template, noun, style, background)
    for template in world.TEMPLATES
    for noun in (*world.OBJECTS, "stag")
    for style in world.STYLES
    for background in world.BACKGROUNDS
}


def spread(values: list[str]) -> int:
    counts = Counter(values)
    return max(counts.values()) - min(counts.values())


@pytest.mark.parametrize(("base", "name"), ALL)
@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_complete_balanced_and_of_the_right_kind(base: str, name: str, held_out: bool):
    concept = load_concept(name, base)
    erase, keep = erase_prompts(concept, 200, 5, held_out), keep_prompts(concept, 200, 5, held_out)
    for row in erase + keep:
        assert "{" not in row.prompt and row.prompt == " ".join(row.prompt.split())
        assert fix_articles(row.prompt) == row.prompt
        assert row.held_out is held_out
        assert 0 <= row.seed < 2**63
    assert all(row.kind == "erase" and concept.mentions(row.prompt) for row in erase)
    assert all(row.kind == "keep" and not concept.mentions(row.prompt) for row in keep)
    assert {row.name for row in erase} == set(concept.names)
    assert {row.name for row in keep} == set(concept.keep) | (set() if held_out else {""})
    assert {row.prompt for row in keep if not row.name} <= set(concept.keep_prompts)
    for rows in (erase, keep):
        assert spread([row.name for row in rows]) <= 1
        for name in {row.name for row in rows if row.name}:
            templates = [row.template for row in rows if row.name == name]
            assert spread(templates) <= 1
            assert set(templates) <= set(concept.held_out_templates if held_out else concept.templates)
    assert len({row.prompt_id for row in erase + keep}) == len({row.seed for row in erase + keep}) == 400


def test_emoji_world_prompts_are_sentences_the_model_was_trained_on():
    for name in catalogue():
        concept = load_concept(name)
        for held_out in (False, True):
            for row in erase_prompts(concept, 300, 1, held_out) + keep_prompts(concept, 300, 1, held_out):
                if row.name:
                    assert row.prompt in WORLD, row


def test_slot_values_are_balanced():
    concept = load_concept("deer")
    rows = [row for row in erase_prompts(concept, 11 * 6 * 8, 3) if "{style}" in row.template]
    styles = Counter(next(style for style in concept.slots["style"] if style in row.prompt) for row in rows)
    assert max(styles.values()) - min(styles.values()) <= 1


def test_rows_depend_on_the_seed_and_a_larger_count_extends_a_smaller_one():
    concept = load_concept("violence")
    assert erase_prompts(concept, 50, 7) == erase_prompts(concept, 80, 7)[:50]
    assert keep_prompts(concept, 50, 7) == keep_prompts(concept, 80, 7)[:50]
    assert [row.prompt for row in erase_prompts(concept, 50, 7)] != [
        row.prompt for row in erase_prompts(concept, 50, 8)
    ]
    assert erase_prompts(concept, 0, 7) == []


def test_training_and_evaluation_share_no_seed():
    concept = load_concept("deer")
    seeds: list[int] = []
    for purpose in ("pairs", "evaluation"):
        for held_out in (False, True):
            for make in (erase_prompts, keep_prompts):
                seeds += [row.seed for seed in (0, 1) for row in make(concept, 300, seed, held_out, purpose)]
    assert len(set(seeds)) == len(seeds) == 4800


def test_neighbours_share_the_images_that_one_erases_and_others_keep():
    noto, fluent = load_concept("noto"), load_concept("fluent")
    erased = {(row.prompt, row.seed) for row in erase_prompts(noto, 100, 3)}
    for concept in (fluent, load_concept("lineart")):
        kept = [(row.prompt, row.seed) for row in keep_prompts(concept, 100, 3) if row.name == "noto"]
        assert len(kept) >= 15 and erased.issuperset(kept)
    complete = [{(r.prompt, r.seed) for r in keep_prompts(c, 100, 3) if not r.name} for c in (noto, fluent)]
    assert complete[0] & complete[1]


def test_rows_are_the_same_on_every_machine():
    wording = "a drawing of a {name}"
    expected = Prompt("875d6b99ddfe48ca", "a drawing of a deer", "erase", "deer", wording, False, 6141719021914723545)
    assert erase_prompts(load_concept("deer"), 1, 0) == [expected]


def test_invalid_arguments_are_refused():
    concept = load_concept("deer")
    with pytest.raises(ValueError, match="count is -1"):
        erase_prompts(concept, -1, 0)
    with pytest.raises(ValueError, match="has no held_out_templates"):
        erase_prompts(concept.model_copy(update={"held_out_templates": ()}), 1, 0, held_out=True)
    with pytest.raises(ValueError, match="keeps nothing"):
        keep_prompts(concept.model_copy(update={"keep": (), "keep_prompts": ()}), 1, 0)


def test_prompts_say_what_they_ask_for_besides_the_name():
    concept = load_concept("deer")
    for held_out in (False, True):
        for row in [*erase_prompts(concept, 60, 0, held_out), *keep_prompts(concept, 60, 0, held_out)]:
            filled = row.template.format(name=row.name, **row.asked) if row.template else row.prompt
            assert fix_articles(filled) == row.prompt
            assert all(value in concept.slots[slot] for slot, value in row.asked.items())
            assert row.asked.keys() == set(SLOT.findall(row.template)) - {"name"}
    styles = {row.asked["style"] for row in erase_prompts(concept, 60, 0) if "style" in row.asked}
    assert styles == set(concept.slots["style"])
    assert given_prompts(concept, ["a deer in noto style"], 1, 0)[0].asked == {}
