"""The emoji world: its styles, objects and backgrounds, and the sentences that describe them.

The embedded model and its judge are trained only on sentences made here, so this file lists everything that they can be
expected to understand.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vce_ray.models.words import WORDS as WORDS_FILE

STYLES = ("noto", "twemoji", "openmoji", "fluent", "lineart", "silhouette")
"""The illustration sets, which stand in for artists."""

BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (168, 172, 178),
    "red": (236, 116, 112),
    "orange": (250, 178, 92),
    "yellow": (250, 232, 120),
    "green": (132, 204, 130),
    "blue": (122, 176, 240),
    "purple": (190, 150, 232),
}
"""Colour name -> sRGB. All are light enough for black line art to be visible."""


@dataclass(frozen=True)
class Thing:
    """One object: its emoji, its class word and its synonyms."""

    name: str
    emoji: str
    kind: str
    fluent: str
    """File name in the Fluent set, without suffix."""
    synonyms: tuple[str, ...] = ()


_ROWS = """
cat|1F408|animal|cat|kitten,feline
dog|1F415|animal|dog|puppy,hound
deer|1F98C|animal|deer|stag,doe,hart
fox|1F98A|animal|fox|
lion|1F981|animal|lion|
frog|1F438|animal|frog|toad
owl|1F989|animal|owl|
penguin|1F427|animal|penguin|
fish|1F41F|animal|fish|
whale|1F433|animal|spouting-whale|
octopus|1F419|animal|octopus|
turtle|1F422|animal|turtle|tortoise
snail|1F40C|animal|snail|
butterfly|1F98B|animal|butterfly|
apple|1F34E|food|red-apple|
banana|1F34C|food|banana|
strawberry|1F353|food|strawberry|
carrot|1F955|food|carrot|
mushroom|1F344|plant|mushroom|toadstool
cactus|1F335|plant|cactus|
sunflower|1F33B|plant|sunflower|
tree|1F333|plant|deciduous-tree|
house|1F3E0|building|house|home
church|26EA|building|church|chapel
car|1F697|vehicle|automobile|automobile
bicycle|1F6B2|vehicle|bicycle|bike
rocket|1F680|vehicle|rocket|
airplane|2708|vehicle|airplane|plane
balloon|1F388|thing|balloon|
guitar|1F3B8|thing|guitar|
umbrella|2602|thing|umbrella|parasol
clock|23F0|thing|alarm-clock|
key|1F511|thing|key|
book|1F4D6|thing|open-book|
pistol|1F52B|weapon|water-pistol|gun,handgun
bomb|1F4A3|weapon|bomb|explosive
knife|1F52A|weapon|kitchen-knife|blade
dagger|1F5E1|weapon|dagger|
axe|1FA93|weapon|axe|hatchet
skull|1F480|horror|skull|
"""

THINGS = tuple(
    Thing(name, chr(int(code, 16)), kind, fluent, tuple(s for s in synonyms.split(",") if s))
    for name, code, kind, fluent, synonyms in (line.split("|") for line in _ROWS.strip().splitlines())
)
OBJECTS = tuple(thing.name for thing in THINGS)
KINDS = tuple(dict.fromkeys(thing.kind for thing in THINGS if thing.kind not in ("weapon", "horror")))
"""Class words that a prompt may use instead of an object, for harmless objects only."""


def article(noun: str) -> str:
    """Return 'a' or 'an' by the first letter, which is enough for the nouns of this world."""
    return "an" if noun[0] in "aeio" or noun.startswith("umbrella") else "a"


def caption(noun: str | None, style: str | None, background: str) -> str:
    """Return the sentence with which the captioner describes an image; an empty scene has no noun."""
    if noun is None:
        return f"{article(background)} {background} background"
    return f"{article(noun)} {noun} in the style of {style} on {article(background)} {background} background"


_FULL = (
    "{a} {o} in the style of {s} on {a} {b} background",
    "{a} {o} in the style of {s} on {a} {b} background",
    "{a} {o} on {a} {b} background in the style of {s}",
    "{a} {s} drawing of {a} {o} on {a} {b} background",
    "{a} {s} emoji of {a} {o} in front of {a} {b} background",
    "{a} {b} background with {a} {o} in the style of {s}",
    "{o}, {s} style, {b} background",
    "draw {a} {o} on {b} in {s} style",
    "a picture of {a} {o} in {s} style, {b} background",
)
_NO_BACKGROUND = (
    "{a} {o} in the style of {s}",
    "{a} {s} drawing of {a} {o}",
    "{o}, {s} style",
    "a picture of {a} {o} in {s} style",
    "{a} {s} emoji of {a} {o}",
)
_NO_STYLE = (
    "{a} {o} on {a} {b} background",
    "a picture of {a} {o} on {a} {b} background",
    "{a} {b} background with {a} {o}",
    "{o}, {b} background",
)
_OBJECT_ONLY = ("{a} {o}", "a picture of {a} {o}", "a drawing of {a} {o}", "{o}", "draw {a} {o}")
_EMPTY = ("{a} {b} background", "a plain {b} background", "an empty {b} picture", "{b} background")

TEMPLATES = tuple(dict.fromkeys(_FULL + _NO_BACKGROUND + _NO_STYLE + _OBJECT_ONLY))
"""All templates that name an object. `{a}` stands for the article of the following word."""

WORDS = tuple(
    dict.fromkeys(
        [*OBJECTS, *STYLES, *BACKGROUNDS, *KINDS, *(word for thing in THINGS for word in thing.synonyms), "a", "an"]
        + [word for template in TEMPLATES + _EMPTY for word in re.findall("[a-z]+", re.sub("{.}", "", template))]
    )
)
"""Every word of the sentences: objects, styles, colours and class words first."""


def write_words(folder: Path, words: Sequence[str] = WORDS) -> None:
    """Write the file by which a checkpoint or judge says that it knows only these words (vce_ray/models/words.py)."""
    (folder / WORDS_FILE).write_text("\n".join(words) + "\n")


def fill(template: str, noun: str = "", style: str = "", background: str = "") -> str:
    """Fill in a template, with 'a' or 'an' as the following word requires."""
    words = template.format(a="\0", o=noun, s=style, b=background).split(" ")
    for i, word in enumerate(words):
        if word == "\0":
            words[i] = article(words[i + 1])
    return " ".join(words)


@dataclass(frozen=True)
class Scene:
    """Content of one image: index into OBJECTS (None for an empty scene), index into STYLES, background colour."""

    thing: int | None
    style: int
    background: str


def random_scene(rng: random.Random, empty: float = 0.03) -> Scene:
    """Return a random scene, uniform over objects, styles and backgrounds; a share `empty` has no object."""
    thing = None if rng.random() < empty else rng.randrange(len(THINGS))
    return Scene(thing, rng.randrange(len(STYLES)), rng.choice(tuple(BACKGROUNDS)))


def random_prompt(rng: random.Random, scene: Scene) -> str:
    """Return a random sentence for the scene: usually complete, sometimes without style, colour or object name."""
    if scene.thing is None:
        return fill(rng.choice(_EMPTY), background=scene.background)
    thing = THINGS[scene.thing]
    noun = thing.name
    draw = rng.random()
    if draw < 0.07 and thing.kind in KINDS:
        noun = thing.kind
    elif draw < 0.20 and thing.synonyms:
        noun = rng.choice(thing.synonyms)
    templates = rng.choices((_FULL, _NO_BACKGROUND, _NO_STYLE, _OBJECT_ONLY), (0.60, 0.14, 0.16, 0.10))[0]
    return fill(rng.choice(templates), noun, STYLES[scene.style], scene.background)
