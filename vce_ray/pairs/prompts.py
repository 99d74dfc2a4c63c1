"""Prompts and seeds of a run: erase prompts, which ask for the concept, and keep prompts, which must be preserved.

Names, templates and slot values are dealt like cards from shuffled decks; a deck is reshuffled only when it is empty.
So all names occur equally often (give or take one), and so do all templates of one name. The first n prompts do not
depend on how many are requested, so a larger run reuses the images of a smaller one.

The wordings and seeds for a name do not depend on the concept either. The images that one concept keeps are therefore
the ones that its neighbours erase or keep, and a fleet draws them once.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.dataflow.ids import stable_id
from vce_ray.errors import UserError

PromptKind = Literal["erase", "keep"]


@dataclass(frozen=True)
class Prompt:
    """One row of the `prompts` stage."""

    prompt_id: str
    prompt: str
    kind: PromptKind
    name: str
    """The concept's name or the neighbour that the prompt asks for; '' for a complete keep prompt."""
    template: str
    """The template with its placeholders; '' for a complete keep prompt and for a user's own prompt."""
    held_out: bool
    """Whether the template is reserved for evaluation."""
    seed: int
    """Sampling seed of this row, below 2**63."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """What the prompt asks for besides the name: the value of each other slot of its template."""


class _Deck:
    """Deals values in shuffled order and reshuffles only when all of them have been dealt."""

    def __init__(self, values: Sequence[str], rng: random.Random):
        self._values = list(values)
        self._rng = rng
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = self._rng.sample(self._values, len(self._values))
        return self._left.pop()


def erase_prompts(
    concept: Concept, count: int, seed: int, held_out: bool = False, purpose: str = "pairs"
) -> list[Prompt]:
    """Return `count` prompts that ask for the concept.

    Args:
        held_out: use the held-out templates instead of the training templates.
        purpose: namespace of the seeds. 'pairs' and 'evaluation' have no (prompt, seed) in common.

    Raises:
        UserError: `held_out` is set and the concept has no held-out templates.
        ValueError: negative count.
    """
    return _deal(concept, concept.names, (), count, seed, "erase", held_out, purpose)


def keep_prompts(
    concept: Concept, count: int, seed: int, held_out: bool = False, purpose: str = "pairs"
) -> list[Prompt]:
    """Return `count` prompts whose images must be preserved: neighbours in the same templates, and `keep_prompts`.

    All `keep_prompts` together occur as often as one neighbour. Held-out prompts ask for neighbours only. Arguments as
    for `erase_prompts`.

    Raises:
        UserError: the concept has nothing to keep, or `held_out` is set and it has no held-out templates.
        ValueError: negative count.
    """
    complete = () if held_out else concept.keep_prompts
    if not concept.keep and not complete:
        raise UserError(f"concept {concept.name!r} keeps nothing: list the neighbours to preserve in `keep`")
    return _deal(concept, concept.keep, complete, count, seed, "keep", held_out, purpose)


def given_prompts(concept: Concept, prompts: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """Return `count` erase prompts from a user's own list, cycling through it with a new seed for each row."""
    rows = []
    for index in range(count):
        text = prompts[index % len(prompts)]
        mentioned = concept.mentions(text)
        name = next((name for name in concept.names if name in mentioned), concept.names[0])
        row_seed = sampling_seed("given", concept.name, seed, index)
        rows.append(Prompt(stable_id("erase", text, row_seed), text, "erase", name, "", False, row_seed))
    return rows


def sampling_seed(*parts: object) -> int:
    """Hash `parts` to a seed below 2**63."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _deal(
    concept: Concept,
    names: Sequence[str],
    complete: Sequence[str],
    count: int,
    seed: int,
    kind: PromptKind,
    held_out: bool,
    purpose: str,
) -> list[Prompt]:
    """Deal `count` prompts for `names` and the complete prompts, which share one card of the deck of names."""
    if count < 0:
        raise ValueError(f"count is {count}: it must not be negative")
    templates = concept.held_out_templates if held_out else concept.templates
    if not templates:
        raise UserError(f"concept {concept.name!r} has no held_out_templates: write some, or use its templates")
    rng = random.Random(sampling_seed("order", purpose, concept.name, kind, held_out, seed))
    name_deck = _Deck([*names, *([""] if complete else [])], rng)
    complete_deck = _Deck(complete, rng)
    by_name = {name: _NamePrompts(concept, name, templates, (purpose, name, held_out, seed)) for name in names}
    occurrences: Counter[str] = Counter()

    rows = []
    for _ in range(count):
        name = name_deck.deal()
        template, text, asked = by_name[name].deal() if name else ("", complete_deck.deal(), {})
        # Seeds count the occurrences of the name (or complete prompt), not the rows, and do not depend on the concept:
        # otherwise the runs of a fleet could not share images.
        subject = name or text
        row_seed = sampling_seed(purpose, subject, held_out, seed, occurrences[subject])
        occurrences[subject] += 1
        prompt_id = stable_id(kind, text, row_seed)
        rows.append(Prompt(prompt_id, text, kind, name, template, held_out, row_seed, asked))
    return rows


class _NamePrompts:
    """Deals the prompts of one name, in an order that depends on `space` and the concept's templates and slots only."""

    def __init__(self, concept: Concept, name: str, templates: Sequence[str], space: tuple[object, ...]):
        rng = random.Random(sampling_seed("order", *space))
        self._name, self._templates = name, _Deck(templates, rng)
        self._slots = {slot: _Deck(concept.slots[slot], rng) for slot in sorted(concept.slots)}

    def deal(self) -> tuple[str, str, dict[str, str]]:
        """Return the next template, the prompt filled from it, and the values of its slots."""
        template = self._templates.deal()
        fillings = {slot: deck.deal() for slot, deck in self._slots.items() if f"{{{slot}}}" in template}
        return template, fix_articles(template.format(name=self._name, **fillings)), fillings
