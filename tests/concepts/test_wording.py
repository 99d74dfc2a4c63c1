"""Plurals and articles."""

from __future__ import annotations

import pytest

from tools.emoji_world import world
from vce_ray.concepts.wording import fix_articles, plural, sentences, third_person

OBJECT_WORDS = set(world.OBJECTS) | {word for thing in world.THINGS for word in thing.synonyms}


@pytest.mark.parametrize(
    ("one", "many"),
    [("knife", "knives"), ("church", "churches"), ("deer", "deer"), ("lady", "ladies"), ("key", "keys"),
     ("young woman", "young women"), ("axe", "axes"), ("wolf", "wolves"), ("bus", "buses"), ("thing", "things"),
     ("hero", "heroes"), ("piano", "pianos"),
     ("swordsman", "swordsmen"), ("human", "humans"), ("hoof", "hooves"), ("roof", "roofs"), ("cliff", "cliffs"),
     ("golf", "golfs"), ("calf", "calves"), ("mouse", "mice"), ("reindeer", "reindeer"), ("鹿", "鹿")],
)  # fmt: skip
def test_plural(one: str, many: str):
    assert plural(one) == many


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("a owl and an cat", "an owl and a cat"),
        ("a openmoji emoji of an umbrella", "an openmoji emoji of an umbrella"),
        ("an unicorn, a hour, an university, a honest man", "a unicorn, an hour, a university, an honest man"),
        ("A animal. An dog.", "An animal. A dog."),
        ("an one-eyed man", "a one-eyed man"),
        ("plan A is set, vitamin A in milk", "plan A is set, vitamin A in milk"),
        ("an SUV and a UFO and an 8-bit icon", "an SUV and a UFO and an 8-bit icon"),
        ('a "octopus" (an big one)', 'an "octopus" (a big one)'),
        ("it's a-ok, banana, à la carte", "it's a-ok, banana, à la carte"),
        ("", ""),
    ],
)
def test_fix_articles(text: str, fixed: str):
    assert fix_articles(text) == fixed
    assert fix_articles(fixed) == fixed


def test_fix_articles_agrees_with_the_emoji_world():
    for word in (*OBJECT_WORDS, *world.STYLES, *world.KINDS):
        assert fix_articles(f"a {word}") == fix_articles(f"an {word}") == f"{world.article(word)} {word}"


def test_sentences_and_verbs():
    assert sentences('A St. Bernard runs. "It is big." He barks!') == [
        "A St. Bernard runs.",
        '"It is big."',
        "He barks!",
    ]
    assert [third_person(verb) for verb in ("stand", "carry", "push", "are", "have")] == [
        "stands", "carries", "pushes", "is", "has",
    ]  # fmt: skip
