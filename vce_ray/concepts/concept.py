"""What to erase: the words for a concept, the prompts that ask for it, and the neighbours that must stay.

A concept is one short YAML file; the fields of `Concept` are its keys. `load.py` reads the file and fills in what it
leaves out, `catalogue/` holds the concepts that ship with the package, and `matching.py` finds their words in text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from vce_ray.concepts.language import is_verb
from vce_ray.concepts.matching import Match, TermTable
from vce_ray.config import PairConfig, describe
from vce_ray.errors import UserError, cut, quote
from vce_ray.training.objectives import train_config

Kind = Literal["object", "style", "explicit"]

SLOT = re.compile(r"\{([^{}]*)\}")
"""A placeholder of a template, such as '{name}'."""

_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_TERM = re.compile(r"[^\W_]+(?:(?:[ \-'&]|\. ?)[^\W_]+)*|[\u2600-\u27bf\U0001f000-\U0001faff]")
"""Words joined by single spaces, hyphens, apostrophes, '&' or full stops, or one emoji: all that matching can find."""
MAX_TERM_LENGTH = 80
_COMMON_WORDS = "a an the of in on at by with and or is are it its his her their this that to from for style background"
_TOO_COMMON = frozenset(_COMMON_WORDS.split())


class Concept(BaseModel):
    """One concept to erase. `load_concept` reads one from YAML; a concept built in code passes the same validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    """Identifier of the concept: 1 to 64 characters of a-z, 0-9, '_' and '-'. The file's name by default."""
    kind: Kind
    """Object, artistic style or explicit content. Selects the shared templates and the rules that refine captions."""
    names: tuple[str, ...]
    """Words that prompts use for the concept; explicit concepts have several."""
    synonyms: tuple[str, ...] = ()
    """Other words for it, and its kinds and breeds: treated in captions as names are."""
    filter_terms: tuple[str, ...] = ()
    """Further words to remove from captions, such as parts of it. Those of a style in capitals are titles of works."""
    other_senses: tuple[str, ...] = ()
    """Phrases in which a term means something else, such as 'hot dog'. They stay in captions."""
    replacement: str = ""
    """Harmless noun that replaces names and synonyms in captions; '' drops the phrase instead."""
    stand_in: str = ""
    """Harmless noun for a filter term that a sentence needs, such as its subject. The replacement by default."""
    templates: tuple[str, ...]
    """Prompts with '{name}', which is filled with the concept or a neighbour, and other {slots}."""
    held_out_templates: tuple[str, ...] = ()
    """Templates used in evaluation only."""
    slots: dict[str, tuple[str, ...]] = {}
    """Values for the other placeholders."""
    keep: tuple[str, ...] = ()
    """Neighbours: similar concepts that must be preserved. They fill '{name}'."""
    keep_prompts: tuple[str, ...] = ()
    """Complete prompts, without placeholders, whose images must be preserved."""
    labels: tuple[str, ...] = ()
    """Labels that the judge chooses among; they include `names` and `keep`."""
    label_template: str = ""
    """How the judge puts a label into words, with '{name}', such as 'a {name} person'. Default: by the kind."""
    seen_texts: tuple[str, ...] = ()
    """What images that show the concept look like, such as 'a photo of a naked person'. With these texts the judge
    detects the concept instead of choosing among `labels`, which need not exclude each other then."""
    unseen_texts: tuple[str, ...] = ()
    """What images without it look like, neighbours included; the judge compares the two lists."""
    question: str = ""
    """What a vision model is asked about an image, to be answered with yes or no. Default: made from the names."""
    content: Literal["nudity", "violence"] | None = None
    """Content that detectors recognize (`config.DETECTORS`), if the concept is of this content."""
    train: dict[str, Any] = {}
    """Training settings for this concept, of VSafe-DPO unless they name a `method`; they override those of its kind."""
    pairs: dict[str, Any] = {}
    """PairConfig settings for this concept, for every method."""

    @field_validator(
        "names", "synonyms", "filter_terms", "other_senses", "templates", "held_out_templates", "keep", "keep_prompts",
        "labels", "seen_texts", "unseen_texts", mode="before",
    )  # fmt: skip
    @classmethod
    def _lists_to_tuples(cls, value: Any, info: ValidationInfo) -> Any:
        return _as_tuple(value, str(info.field_name))

    @field_validator("train", "pairs")
    @classmethod
    def _check_settings(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        try:
            (train_config if info.field_name == "train" else PairConfig.model_validate)(value)
        except ValidationError as error:
            raise UserError(describe(error)) from error
        return value

    @field_validator("slots", mode="before")
    @classmethod
    def _slots_to_tuples(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {slot: _as_tuple(fillings, f"slots.{slot}") for slot, fillings in value.items()}
        raise UserError(f"slots must map each slot to a list, such as background: [red, blue], not {quote(value)}")

    @model_validator(mode="after")
    def _check(self) -> Concept:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"name {quote(self.name)} must be 1 to 64 characters of a-z, 0-9, '_' and '-'")
        for field in ("names", "templates"):
            if not getattr(self, field):
                raise UserError(f"{field} is empty: give at least one")
        for field, value in self:
            if isinstance(value, tuple):
                _check_entries(field, value)
        if self.label_template and SLOT.findall(self.label_template) != ["name"]:
            raise UserError(
                f"label_template {quote(self.label_template)} must contain {{name}} once, and no other slot"
            )
        if bool(self.seen_texts) != bool(self.unseen_texts):
            raise UserError("seen_texts and unseen_texts are compared with each other: give both, or neither")
        self._check_terms()
        self._check_templates()
        self._check_kept()
        return self

    def _check_terms(self) -> None:
        for term in self.names + self.synonyms + self.filter_terms:
            if not _TERM.fullmatch(term) or len(term) > MAX_TERM_LENGTH:
                raise UserError(
                    f"term {quote(term)} can never occur in a caption: write plain words joined by single spaces, "
                    f"hyphens or apostrophes, at most {MAX_TERM_LENGTH} characters, no wildcards"
                )
            if term.lower() in _TOO_COMMON or (len(term) == 1 and term.isascii()):
                raise UserError(
                    f"term {quote(term)} occurs in nearly every caption: give a word specific to the concept"
                )
        for field in ("replacement", "stand_in"):
            if found := self.mentions(getattr(self, field)):
                raise UserError(
                    f"{field} {quote(getattr(self, field))} would itself be filtered, as {found[0]!r}: choose another "
                    "word"
                )
        for phrase in self.other_senses:
            if not any(_table(self.kind, self.terms(), (), ()).find(phrase)):
                raise UserError(f"other_senses contains {quote(phrase)}, which has no term of the concept: remove it")

    def _check_templates(self) -> None:
        used: set[str] = set()
        for template in self.templates + self.held_out_templates:
            if SLOT.sub("", template).count("{") or SLOT.sub("", template).count("}"):
                raise UserError(f"template {quote(template)} has an unpaired brace: write placeholders as {{slot}}")
            placeholders = SLOT.findall(template)
            if "name" not in placeholders:
                raise UserError(f"template {quote(template)} has no {{name}}: add it where the concept belongs")
            for slot in placeholders:
                if slot != "name" and slot not in self.slots:
                    known = ", ".join(sorted(self.slots)) or "none"
                    raise UserError(
                        f"template {quote(template)} has the unknown slot {{{cut(slot)}}}: known are name, {cut(known)}"
                    )
            used.update(placeholders)
            if found := self.mentions(SLOT.sub(" , ", template)):
                raise UserError(
                    f"template {quote(template)} contains the term {found[0]!r}: use {{name}} instead: templates are "
                    "also filled with neighbours"
                )
        if both := set(self.templates) & set(self.held_out_templates):
            raise UserError(f"template {quote(min(both))} is in both templates and held_out_templates: remove one")
        for slot, fillings in self.slots.items():
            if slot not in used:
                raise UserError(f"slot {quote(slot)} is used by no template: remove it, or use it in one")
            if not fillings:
                raise UserError(f"slot {quote(slot)} is empty: give at least one value")
            _check_entries(f"slots.{slot}", fillings)

    def _check_kept(self) -> None:
        kept = [("keep", name) for name in self.keep] + [("keep_prompts", prompt) for prompt in self.keep_prompts]
        kept += [(f"slots.{slot}", filling) for slot, fillings in self.slots.items() for filling in fillings]
        for field, text in kept:
            if found := self.mentions(text):
                raise UserError(
                    f"{field} contains {quote(text)}, but {found[0]!r} is a term of the concept: remove one of the two"
                )
        for prompt in self.keep_prompts:
            if "{" in prompt or "}" in prompt:
                raise UserError(f"keep_prompts must be complete prompts, but {quote(prompt)} contains a brace")
        for field in ("names", "keep"):
            if self.labels and (missing := [name for name in getattr(self, field) if name not in self.labels]):
                raise UserError(
                    f"{field} contains {quote(missing[0])}, which is not one of the judge's labels: "
                    f"{cut(', '.join(self.labels))}"
                )

    def terms(self) -> tuple[str, ...]:
        """Return all terms of the concept (names, synonyms, filter terms) without duplicates, longest first."""
        words = dict.fromkeys(self.names + self.synonyms + self.filter_terms)
        return tuple(sorted(words, key=lambda term: (-len(term), term)))

    def mentions(self, text: str) -> tuple[str, ...]:
        """Return the terms that occur in `text`, in order of appearance, each once. See `matches`."""
        return tuple(dict.fromkeys(match.term for match in self.matches(text)))

    def matches(self, text: str) -> list[Match]:
        """Return the occurrences of terms in `text` as whole words, in order of appearance.

        Letter case, plurals, possessives, accents, and hyphens in place of spaces are ignored, as matching.py tells.
        Phrases of `other_senses` do not count, nor, for an object, do verbs: 'ships' in 'a shop that ships flowers'.
        """
        table = _table(self.kind, self.names + self.synonyms, self.filter_terms, self.other_senses)
        return [
            match for match in table.find(text) if self.kind != "object" or not is_verb(text, match.start, match.end)
        ]


@lru_cache(maxsize=256)
def _table(kind: Kind, names: tuple[str, ...], others: tuple[str, ...], senses: tuple[str, ...]) -> TermTable:
    """Return the table of a concept's terms: of `names`, which include synonyms, and of the `others`."""
    artists = [term for term in names if kind == "style" and not term.islower()]
    titles = [term for term in others if kind == "style" and " " in term and not term.islower()]
    return TermTable((*names, *others), artists, titles, senses)


def _as_tuple(value: Any, field: str) -> Any:
    if isinstance(value, list | tuple):
        return tuple(value)
    raise UserError(f"{field} must be a list, such as {field}: [first, second], not {quote(value)}")


def _check_entries(field: str, values: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for value in values:
        if not value.strip() or value != value.strip() or "\n" in value:
            raise UserError(
                f"{field} contains {quote(value)}: it must be a single line, not blank, with no spaces around it"
            )
        if value.lower() in seen:
            raise UserError(f"{field} contains {quote(value)} twice: remove one")
        seen.add(value.lower())
