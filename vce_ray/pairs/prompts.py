"""Which prompts are drawn, and with which seeds: those that ask for the concept, and those that must stay.

Names, templates and slot fillings are dealt like cards from shuffled decks, each dealt out before it is
shuffled again: every name comes equally often (give or take one), and under one name every template does.
The first n prompts are the same however many are asked for, so a larger run keeps what a smaller one drew.

What is asked of a name, and with which seeds, does not depend on the concept: the pictures that one concept keeps are
those that its neighbours erase or keep, and a fleet draws them once.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vce_ray.concepts.concept import Concept, fix_articles
from vce_ray.dataflow.ids import stable_id
from vce_ray.errors import UserError

PromptKind = Literal["erase", "keep"]
MAX_PROMPT_LENGTH = 1000
MAX_PROMPTS = 100_000


@dataclass(frozen=True)
class Prompt:
    """One row of the prompts stage."""

    prompt_id: str
    prompt: str
    kind: PromptKind
    name: str
    """The concept's name or the neighbour that the prompt asks for; '' for a whole keep prompt."""
    template: str
    """The wording before it was filled; '' for a whole keep prompt."""
    held_out: bool
    """Whether the wording is one that makes no training pairs."""
    seed: int
    """Sampling seed of this row, below 2**63."""


class _Deck:
    """Deals values in shuffled order, and shuffles again only when every one has been dealt."""

    def __init__(self, values: Sequence[str], rng: random.Random):
        self._values = list(values)
        self._rng = rng
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = self._rng.sample(self._values, len(self._values))
        return self._left.pop()


def erase_prompts(
    concept: Concept,
    count: int,
    seed: int,
    held_out: bool = False,
    purpose: str = "pairs",
    names: Sequence[str] | None = None,
) -> list[Prompt]:
    """`count` prompts that ask for the concept, in the training wordings or the held-out ones.

    `purpose` is a namespace of seeds: 'pairs' and 'evaluation' share no (prompt, seed). `names` takes other
    words for the concept than `concept.names`: its synonyms, when generality is evaluated. Raises UserError
    for a negative count, for no names, and for held-out prompts of a concept that has none.
    """
    asked = concept.names if names is None else tuple(names)
    if not asked:
        raise ValueError(f"concept {concept.name!r}: no names to make prompts of")
    return _deal(concept, asked, (), count, seed, "erase", held_out, purpose)


def keep_prompts(
    concept: Concept, count: int, seed: int, held_out: bool = False, purpose: str = "pairs"
) -> list[Prompt]:
    """`count` prompts whose images must stay: neighbours in the same wordings, and the concept's whole prompts.

    The whole prompts together come as often as one neighbour; held-out prompts are of neighbours alone.
    Arguments and errors as in `erase_prompts`.
    """
    whole = () if held_out else concept.keep_prompts
    if not concept.keep and not whole:
        raise UserError(f"concept {concept.name!r} keeps nothing: fill `keep` with neighbours that must stay")
    return _deal(concept, concept.keep, whole, count, seed, "keep", held_out, purpose)


def given_prompts(concept: Concept, prompts: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """`count` erase prompts out of a user's own, in turn, each time with a new seed."""
    rows = []
    for index in range(count):
        text = prompts[index % len(prompts)]
        asked = concept.mentions(text)
        name = next((name for name in concept.names if name in asked), concept.names[0])
        row_seed = sampling_seed("given", concept.name, seed, index)
        rows.append(Prompt(stable_id("erase", text, row_seed), text, "erase", name, "", False, row_seed))
    return rows


def sampling_seed(*parts: object) -> int:
    """A seed below 2**63 that follows from `parts`, for one row."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def read_prompts(path: str | Path) -> list[str]:
    """A user's own prompts, one per line of a UTF-8 file; blanks around a line are dropped.

    Raises UserError that names file and line for an empty, overlong or repeated line, for control
    characters, and for a file that cannot be read or holds no or too many prompts.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompts file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise UserError(f"{path} holds no prompts: write one per line")
    if len(lines) > MAX_PROMPTS:
        raise UserError(f"{path} holds {len(lines)} lines; at most {MAX_PROMPTS} prompts are taken")
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if not prompt:
            raise UserError(f"{path}, line {number}: an empty line where a prompt should be")
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise UserError(f"{path}, line {number}: {len(prompt)} characters; at most {MAX_PROMPT_LENGTH} are taken")
        if found := re.search(r"[\x00-\x1f\x7f-\x9f]", prompt):
            raise UserError(f"{path}, line {number}: the control character {found.group()!r} in a prompt")
        if prompt in first_line:
            raise UserError(f"{path}, line {number}: {prompt!r} stands in line {first_line[prompt]} already")
        first_line[prompt] = number
    return list(first_line)


def _deal(
    concept: Concept,
    names: Sequence[str],
    whole: Sequence[str],
    count: int,
    seed: int,
    kind: PromptKind,
    held_out: bool,
    purpose: str,
) -> list[Prompt]:
    if count < 0:
        raise ValueError(f"count is {count}: it must not be negative")
    templates = concept.held_out_templates if held_out else concept.templates
    if not templates:
        raise UserError(f"concept {concept.name!r} has no held_out_templates: write some, or use its templates")
    rng = random.Random(sampling_seed("order", purpose, concept.name, kind, held_out, seed))
    name_deck = _Deck([*names, *([""] if whole else [])], rng)
    whole_deck = _Deck(whole, rng)
    of_name = {name: _Wordings(concept, name, templates, (purpose, name, held_out, seed)) for name in names}
    times: Counter[str] = Counter()

    rows = []
    for _ in range(count):
        name = name_deck.deal()
        template, text = of_name[name].deal() if name else ("", whole_deck.deal())
        asked = name or text
        row_seed = sampling_seed(purpose, asked, held_out, seed, times[asked])
        times[asked] += 1
        prompt_id = stable_id(kind, text, row_seed)
        rows.append(Prompt(prompt_id, text, kind, name, template, held_out, row_seed))
    return rows


class _Wordings:
    """The prompts that ask for one name, in an order that depends on `space` alone."""

    def __init__(self, concept: Concept, name: str, templates: Sequence[str], space: tuple[object, ...]):
        rng = random.Random(sampling_seed("order", *space))
        self._name, self._templates = name, _Deck(templates, rng)
        self._slots = {slot: _Deck(concept.slots[slot], rng) for slot in sorted(concept.slots)}

    def deal(self) -> tuple[str, str]:
        """A template, and the prompt that is made of it."""
        template = self._templates.deal()
        fillings = {slot: deck.deal() for slot, deck in self._slots.items() if f"{{{slot}}}" in template}
        return template, fix_articles(template.format(name=self._name, **fillings))
