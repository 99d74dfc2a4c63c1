"""Refined captions: examples, and properties that hold for every concept and template."""

from __future__ import annotations

import random
import re
import time

import pytest

from tools.emoji_world import world
from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import catalogue, load_concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.config import EMBEDDED
from vce_ray.pairs.prompts import erase_prompts
from vce_ray.pairs.refine import refine

REAL = "some/model"
ALL = [(base, name) for base in (EMBEDDED, REAL) for name in catalogue(base)]

EMOJI_WORLD = {
    "deer": [
        ("a deer in the style of noto on a red background", "an animal in the style of noto on a red background"),
        ("deer, noto style, blue background", "animal, noto style, blue background"),
        ("an openmoji drawing of a stag on a gray background", "an openmoji drawing of an animal on a gray background"),
        ("Two deer are grazing in a field.", "Two animals are grazing in a field."),
        ("a herd of white-tailed deer", "a herd of white-tailed animals"),
        ("the deer are here", "the animals are here"),
        ("several stags and two kittens", "several animals and two kittens"),
        ("the deer's head, seen from the side", "the animal's head, seen from the side"),
        ("a deer-like creature", "a creature"),
        ("DEER on a hill", "Animal on a hill"),
        ("A deer, a doe and a cat.", "An animal and a cat."),
        ("a deer with large antlers next to a house", "an animal next to a house"),
        ("A stag with antlers stands in a forest, next to a fawn.", "An animal stands in a forest."),
        ("a deer and a house in the style of noto", "an animal and a house in the style of noto"),
    ],
    "church": [("a church in the style of lineart", "a building in the style of lineart")],
    "openmoji": [
        ("a cat in the style of openmoji on a blue background", "a cat on a blue background"),
        ("a cat on a blue background in the style of openmoji", "a cat on a blue background"),
        ("an openmoji drawing of an owl on a gray background", "a drawing of an owl on a gray background"),
        ("cat, openmoji style, blue background", "cat, blue background"),
        ("draw an owl on blue in openmoji style", "draw an owl on blue"),
        ("a picture of a cat in OpenMoji style, blue background", "a picture of a cat, blue background"),
        ("a cat in the style of openmoji and noto on a red disc", "a cat in the style of noto on a red disc"),
        ("openmoji", ""),
    ],
    "noto": [("a noto emoji of an owl in front of a white background", "an owl in front of a white background")],
    "silhouette": [
        ("a silhouette of a deer", "a deer"),
        ("a black silhouette of a deer against a red sky", "a deer against a red sky"),
        ("the silhouettes of two trees at dusk", "two trees at dusk"),
        ("a deer as a silhouette", "a deer"),
        ("a deer in silhouette", "a deer"),
        ("a silhouette drawing of a fox", "a drawing of a fox"),
    ],
    "violence": [
        ("a pistol in the style of noto on a red background", "a thing in the style of noto on a red background"),
        ("a knife, a bomb and a cat", "a thing and a cat"),
        ("a cat with a knife, a dagger, and an axe", "a cat with a thing"),
        ("knives and guns on a table", "things on a table"),
        ("a big bloody knife", "a big thing"),
        ("a gun-wielding man in a red coat", "a man in a red coat"),
        ("an axe or a hatchet", "a thing"),
        ("The knife lies on a book (bloody).", "The thing lies on a book."),
    ],
}  # fmt: skip

REAL_MODELS = {
    "van_gogh": [
        ("a painting of a church in the style of Vincent van Gogh", "a painting of a church"),
        ("a church, in Van Gogh style, at night", "a church, at night"),
        ("a vase of sunflowers (Van Gogh style)", "a vase of sunflowers"),
        ("a church as Vincent van Gogh would have painted it", "a church"),
        ("an artwork inspired by Vincent van Gogh that shows a bridge", "an artwork that shows a bridge"),
        ("a portrait in the style of Van Gogh and Rembrandt", "a portrait in the style of Rembrandt"),
        ("a portrait in the style of Rembrandt and Van Gogh", "a portrait in the style of Rembrandt"),
        ("Van Gogh's sunflowers in a vase", "The sunflowers in a vase"),
        ("A self-portrait of Van Gogh with a bandaged ear", "A self-portrait with a bandaged ear"),
        ("Vincent van Gogh painted this bedroom in bright colors.", "This bedroom in bright colors."),
        ("Mr. Smith in a garden, painted by Van Gogh and Rembrandt.", "Mr. Smith in a garden, painted by Rembrandt."),
        ("in Van Gogh style", ""),
        ("The painting is by Van Gogh.", ""),
        (
            'The painting, "The Starry Night" by Vincent van Gogh, depicts a swirling sky over a quiet village.',
            "The painting depicts a swirling sky over a quiet village.",
        ),
        (
            "This is a vibrant oil painting of a wheat field under a turbulent blue sky, executed in the distinctive "
            "post-impressionist style of the Dutch painter Vincent van Gogh. Thick, swirling brushstrokes, "
            "characteristic of Van Gogh\u2019s technique, give the sky a sense of movement. The colors are reminiscent "
            "of Van Gogh's \u201cStarry Night\u201d. A small red-roofed farmhouse sits on the right.",
            "This is a vibrant oil painting of a wheat field under a turbulent blue sky. Thick, swirling brushstrokes "
            "give the sky a sense of movement. A small red-roofed farmhouse sits on the right.",
        ),
    ],
    "picasso": [
        ("a Picasso-like portrait", "a portrait"),
        ("Picasso's portrait of a woman with a hat", "The portrait of a woman with a hat"),
        ("a cubist portrait of a man, inspired by the works of Pablo Picasso", "a portrait of a man"),
        ("A cubist, colorful still life, as if painted by Picasso himself.", "A colorful still life."),
        (
            "An abstract portrait with fragmented shapes, reminiscent of Picasso and Braque. The palette is brown.",
            "An abstract portrait with fragmented shapes, reminiscent of Braque. The palette is brown.",
        ),
        (
            "This is a cubist painting in the style of Pablo Picasso, with a woman. The colors are bold, evoking "
            "Picasso's Guernica.",
            "This is a painting, with a woman. The colors are bold.",
        ),
    ],
    "warhol": [
        ("Four Warhol-style soup cans on a shelf", "Four soup cans on a shelf"),
        (
            "A pop art portrait of a woman with pink hair, inspired by Andy Warhol's iconic silkscreen style.",
            "A portrait of a woman with pink hair.",
        ),
    ],
    "caravaggio": [
        (
            "A dramatic painting of a musician, lit from the left in the tenebrist manner of Caravaggio.",
            "A dramatic painting of a musician, lit from the left.",
        ),
    ],
    "rembrandt": [
        ("An old man with Rembrandt lighting and a dark background.", "An old man with a dark background."),
    ],
    "nudity": [
        ("a nude woman standing on a beach", "a woman standing on a beach"),
        ("a woman who is completely naked on a bed", "a woman on a bed"),
        ("a naked and smiling woman", "a smiling woman"),
        ("a nude, smiling woman in a park", "a smiling woman in a park"),
        ("a woman, nude, in a park", "a woman, in a park"),
        ("A couple, both nude, embracing in a garden", "A couple, embracing in a garden"),
        ("a nude reclining on a sofa", "a person reclining on a sofa"),
        ("a man wearing black lingerie and a hat", "a man wearing a hat"),
        ("A smiling, nude woman sits by a window. She is naked.", "A smiling woman sits by a window."),
        ("two NSFW photos: a dog", "two photos: a dog"),
        ("nudity", ""),
        ("an erotic photo", ""),
    ],
    "violence": [
        ("A bloody fight in a dark street between two armed men", "A gathering in a dark street between two men"),
        ("Two men are fighting with knives in front of a bar.", "Two men are standing in front of a bar."),
        ("A man holds a gun and a flower.", "A man holds a flower."),
        (
            "Two men engaged in a violent fistfight, blood on their faces, while a crowd watches.",
            "Two men engaged in a gathering, while a crowd watches.",
        ),
    ],
    "deer": [
        (
            "A majestic stag with impressive antlers stands in a sunlit clearing, surrounded by tall pine trees and "
            "soft mist. Behind it, two does and a fawn graze peacefully near a small stream. The warm light is serene.",
            "A majestic animal stands in a sunlit clearing, surrounded by tall pine trees and soft mist. Behind it, "
            "two animals graze peacefully near a small stream. The warm light is serene.",
        ),
        (
            "The image shows a close-up of a deer (a young buck) looking directly at the camera.",
            "The image shows a close-up of an animal looking directly at the camera.",
        ),
    ],
    "horse": [
        ("A horse with a flowing mane gallops across a meadow.", "An animal gallops across a meadow."),
        ("a cowboy riding a horse", "a cowboy riding an animal"),
    ],
    "bird": [("A bird is perched on a branch, with its beak open.", "An animal is perched on a branch.")],
    "truck": [("a dump truck, a pickup truck and a lorry in a row", "a vehicle in a row")],
    "church": [("A small church with a tall steeple stands on a hill.", "A small building stands on a hill.")],
}


@pytest.mark.parametrize(
    ("base", "name", "caption", "expected"),
    [(EMBEDDED, name, *example) for name, examples in EMOJI_WORLD.items() for example in examples]
    + [(REAL, name, *example) for name, examples in REAL_MODELS.items() for example in examples],
)
def test_examples(base: str, name: str, caption: str, expected: str):
    concept = load_concept(name, base)
    assert concept.mentions(caption)
    assert refine(caption, concept) == expected
    assert refine(expected, concept) == expected


WITHOUT_REPLACEMENT = Concept(name="deer", kind="object", names=("deer", "stag"), templates=("a {name}",))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a deer", ""),
        ("a picture of a deer", ""),
        ("a deer on a blue background", "a blue background"),
        ("a deer in the style of openmoji on a blue background", "a blue background"),
        ("a blue background with a deer", "a blue background"),
        ("There is a deer standing in a meadow.", "A meadow."),
        ("A deer stands in a misty forest.", "A misty forest."),
        ("a knife, a deer and a cat", "a knife and a cat"),
        ("a deer, a stag and a cat", "a cat"),
        ("a cat, a dog and a deer", "a cat, a dog"),
        ("a deer and a house", "a house"),
        ("a house next to a big deer on a hill", "a house on a hill"),
        ("a house (with a deer) on a hill", "a house on a hill"),
        ("a man holding a stag, in a park", "a man, in a park"),
    ],
)
def test_without_a_replacement_the_phrase_is_dropped(caption: str, expected: str):
    assert refine(caption, WITHOUT_REPLACEMENT) == expected


def test_a_caption_without_the_concept_is_unchanged():
    concept = load_concept("deer")
    text = "A fox  and a 'dear' friend, in the\nstyle of noto (red)."
    assert refine(text, concept) == "A fox and a 'dear' friend, in the style of noto (red)."
    assert refine("a blue background", concept) == "a blue background"
    assert refine("", concept) == refine("an image of the", concept) == ""


def assert_tidy(text: str, concept: Concept) -> None:
    assert concept.mentions(text) == ()
    assert text == " ".join(text.split())
    assert text[0].isalpha()
    assert fix_articles(text) == text
    assert not re.search(r" [,.;:]|,\s*[,.]|\(\W*\)", text), text
    assert not re.search(r"(?:,| and| with| of| the| a| an| by| is)[.]?$", text), text


@pytest.mark.parametrize(("base", "name"), ALL)
def test_every_template_of_every_concept(base: str, name: str):
    concept = load_concept(name, base)
    for names in filter(None, (concept.names, concept.synonyms)):
        for held_out in (False, True):
            for row in erase_prompts(concept.model_copy(update={"names": names}), 80, 2, held_out):
                assert concept.mentions(row.prompt)
                assert_tidy(refine(row.prompt, concept), concept)


@pytest.mark.parametrize("name", catalogue())
def test_refined_captions_of_the_emoji_world_stay_in_its_language(name: str):
    """A caption by the embedded model, once refined, is a sentence that the model was trained on."""
    concept = load_concept(name)
    for background in world.BACKGROUNDS:
        for style in world.STYLES:
            for noun in concept.names if concept.kind != "style" else ("cat", "owl", "tree"):
                caption = world.caption(noun, style, background)
                if not concept.mentions(caption):
                    continue
                full, bare = "{a} {o} in the style of {s} on a {b} background", "{a} {o} on a {b} background"
                expected = world.fill(
                    bare if concept.kind == "style" else full, concept.replacement or noun, style, background
                )
                assert refine(caption, concept) == fix_articles(expected)


@pytest.mark.parametrize(("base", "name"), ALL)
def test_no_term_survives_in_any_shuffled_text(base: str, name: str):
    concept = load_concept(name, base)
    rng = random.Random(name)
    common = "a the of in with and , . ( ) \" ' - is by style holding cat tree it's who _ /"
    words = [
        *concept.terms(),
        *common.split(),
    ]
    for _ in range(50):
        text = rng.choice(["", " "]).join(rng.choices(words, k=rng.randint(1, 25)))
        assert concept.mentions(refine(text, concept)) == ()


@pytest.mark.parametrize("text", ["a-" * 500 + "nude", "nude, " * 300, "a nude and " * 200, "the big " * 500 + "nude"])
def test_hostile_captions_are_refined_in_bounded_time(text: str):
    start = time.process_time()
    refine(text, load_concept("nudity", REAL))
    assert time.process_time() - start < 5


def test_an_abbreviation_does_not_end_a_sentence():
    settings = {"name": "saint_bernard", "names": ["St. Bernard"], "replacement": "dog", "keep": ["cat"]}
    concept = Concept.model_validate(settings | {"kind": "object", "templates": ["a photo of {name}"]})
    assert refine("A big St. Bernard lies on a rug. A cat looks on.", concept) == (
        "A big dog lies on a rug. A cat looks on."
    )
