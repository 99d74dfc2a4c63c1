"""What a prompt asks for besides the concept, as questions to a classifier: which style, which background?

A slot of a concept's templates has a closed set of values, so any CLIP can be asked which of them an image shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.wording import fix_articles

_WORDINGS = {"style": "in the style of {}", "background": "a {} background"}
"""Texts for the values of slots that are no phrases by themselves."""
_LEADING_WORDS = """
    a an the some one two three his her their in on at by with under over near beside behind inside above below of from
    against among during
"""
_LEADING = frozenset(_LEADING_WORDS.split())
"""First words of a phrase that takes no article: 'a church', 'at sunset'."""


@dataclass(frozen=True)
class Question:
    """One slot, and the values among which a classifier chooses."""

    slot: str
    choices: tuple[str, ...]
    at_once: int
    """How many of the choices a right image shows; as many best ones count as seen."""

    @property
    def texts(self) -> list[str]:
        """Texts of the choices for a CLIP."""
        return [slot_text(self.slot, choice) for choice in self.choices]

    @property
    def chance(self) -> float:
        """Share of images that blind guessing gets right."""
        return self.at_once / len(self.choices)


def questions(concept: Concept) -> list[Question]:
    """Return the question for each slot that leaves a choice, in the order of the slots' names.

    A prompt with an object of the concept and one of the slot `object` asks for two objects at once. The concept's
    names are then choices too, and the value is right as one of the two best.
    """
    found = []
    for slot, values in sorted(concept.slots.items()):
        beside = slot == "object" and concept.kind != "style"
        choices = (*values, *concept.names) if beside else values
        if len(choices) > 1 + beside:
            found.append(Question(slot, choices, 1 + beside))
    return found


def slot_text(slot: str, value: str) -> str:
    """Return the text for a value: 'in the style of noto', 'a red background', 'an oil painting', 'at sunset'."""
    return _WORDINGS[slot].format(value) if slot in _WORDINGS else phrase(value)


def phrase(text: str) -> str:
    """Return a noun with its article; a phrase that begins with an article or a preposition stays as it is."""
    return text if text.partition(" ")[0].lower() in _LEADING else fix_articles(f"a {text}")
