"""How terms are found in text."""

from __future__ import annotations

import time

import pytest

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.concepts.matching import TermTable

REAL = "some/model"


def found(terms: list[str], text: str) -> list[str]:
    return [match.term for match in TermTable(terms).find(text)]


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("buffalo", "two buffaloes"),
        ("mosquito", "mosquitos and mosquitoes"),
        ("wolf", "a pack of wolves"),
        ("hoof", "hooves and hoofs"),
        ("scarf", "three scarves"),
        ("swordsman", "two swordsmen"),
        ("gunman", "gunmen"),
        ("mouse", "white mice"),
        ("church", "old churches"),
        ("pony", "ponies"),
        ("deer", "deers"),
        ("bell tower", "bell towers"),
    ],
)
def test_plurals_are_found(term: str, text: str) -> None:
    assert set(found([term], text)) == {term}


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("Van Gogh", "a \uff36\uff41\uff4e\u3000\uff27\uff4f\uff47\uff48 painting"),
        ("cafe", "the CAFÉ at night"),
        ("café", "a cafe and a cafe\u0301"),
        ("tree frog", "tree-frogs, a tree\u2011frog, tree_frog"),
        ("cat", "a c\u00adat and a ca\u200bt"),
        ("鹿", "森の中の鹿です"),
        ("梵高", "一幅梵高风格的画"),
        ("🦌", "a 🦌\ufe0f on red"),
        ("Campbell's Soup Cans", "Campbell\u2019s soup cans"),
        ("St. Bernard", "two St. Bernards"),
    ],
)
def test_spelling_makes_no_difference(term: str, text: str) -> None:
    assert set(found([term], text)) == {term}


@pytest.mark.parametrize("text", ["wolverine", "a cat, fish", "catfish", "4cat", "dis-cat-ch" + "ed"])
def test_parts_of_words_and_words_across_commas_are_not(text: str) -> None:
    assert found(["wolf", "cat fish"], text) == []


@pytest.mark.parametrize(
    ("concept", "text"),
    [
        ("van_gogh", "by Vincent Van Gough"),
        ("van_gogh", "a Vangogh picture"),
        ("van_gogh", "in the manner of van Goh"),
        ("van_gogh", "a vangoghesque portrait"),
        ("picasso", "by Piccaso"),
        ("picasso", "by Picaso"),
        ("picasso", "a Picassoesque face"),
        ("rembrandt", "a Rembrant"),
        ("rembrandt", "Rembrandtesque light"),
        ("caravaggio", "by Carravagio"),
        ("warhol", "an Andy Warhole print"),
        ("warhol", "a Warholian repetition"),
    ],
)
def test_artists_are_found_misspelt_and_with_endings(concept: str, text: str) -> None:
    assert load_concept(concept, REAL).mentions(text)


@pytest.mark.parametrize(
    ("concept", "text"),
    [
        ("van_gogh", "a van going home, a gogo bar, Vince, a vague van"),
        ("van_gogh", "a starry night over the village"),
        ("picasso", "a picador, picas, a cube"),
        ("rembrandt", "a remnant, a remembrance wreath, a night watch"),
        ("caravaggio", "a caravan"),
        ("warhol", "a warhead, a warthog, a warhorse"),
        ("dog", "hot dogs, a dog-eared book, a prairie dog"),
        ("cat", "a cat burglar"),
        ("deer", "Kevin Hart, ten bucks, a fawn-colored sofa"),
        ("violence", "a shooting star, a heart attack, a glue gun, a pillow fight"),
        ("airplane", "jet black hair, a jet ski, a plane tree"),
    ],
)
def test_other_senses_and_similar_words_are_not(concept: str, text: str) -> None:
    assert load_concept(concept, REAL).mentions(text) == ()


def test_a_title_needs_its_capitals() -> None:
    concept = load_concept("van_gogh", REAL)
    assert concept.mentions("a print of The Starry Night") == ("The Starry Night",)
    assert concept.mentions("a print of the starry night sky") == ()


@pytest.mark.parametrize(
    ("concept", "text", "mentioned"),
    [
        ("deer", "The bird does a trick.", False),
        ("deer", "Two does and a fawn graze.", True),
        ("deer", "A horse bucks in a rodeo.", False),
        ("ship", "A worker ships parcels from a warehouse.", False),
        ("ship", "A shop that ships flowers.", False),
        ("ship", "Ships in a harbor.", True),
        ("horse", "Kids horse around in a pool.", False),
        ("airplane", "A carpenter planes a board in his workshop.", False),
        ("airplane", "Two planes above a bridge.", True),
    ],
)
def test_a_verb_is_no_mention_of_an_object(concept: str, text: str, mentioned: bool) -> None:
    assert bool(load_concept(concept, REAL).mentions(text)) == mentioned


def test_other_senses_are_checked_and_can_be_given() -> None:
    values = {"name": "duck", "kind": "object", "names": ["duck"], "keep": ["owl"], "templates": ["a {name}"]}
    concept = Concept.model_validate(values | {"other_senses": ["duck tape"]})
    assert concept.mentions("a roll of duck tape") == () and concept.mentions("duck tape and a duck") == ("duck",)
    with pytest.raises(ValueError, match="other_senses contains 'rubber band'"):
        Concept.model_validate(values | {"other_senses": ["rubber band"]})
    with pytest.raises(ValueError, match="stand_in 'duck' would itself be filtered"):
        Concept.model_validate(values | {"stand_in": "duck"})


def test_hostile_texts_are_searched_in_bounded_time() -> None:
    table = TermTable(["van gogh", "cat"], artists=["van gogh"])
    start = time.process_time()
    for text in ("van " * 20_000, "-" * 100_000, "a\u0301" * 50_000, "鹿" * 50_000, "vangogx" * 10_000):
        assert not list(table.find(text))
    assert time.process_time() - start < 10
