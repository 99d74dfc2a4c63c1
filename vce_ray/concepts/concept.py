"""What is to be erased: a concept's words, the prompts that ask for it, and the neighbours that must stay.

A concept is one short YAML file. The catalogue lies in `vce_ray/concepts/`: one folder per embedded base
model, and the files beside them for real models. What the concepts of a folder share (fillings of
placeholders, templates by kind, what a judge can tell apart) stands once in the folder's `slots.yaml`;
a concept's own file overrides it. Matching of words in running text, plurals included, lives here too,
so that filtering captions and checking them can never disagree.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from vce_ray.config import PairConfig, TrainConfig
from vce_ray.errors import UserError

Kind = Literal["object", "style", "explicit"]

CATALOGUE = Path(__file__).with_name("catalogue")
DEFAULTS_FILE = "slots.yaml"

_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_TERM = re.compile(r"[^\W_]+(?:(?:[ \-'&]|\. ?)[^\W_]+)*")
"""Words joined by single spaces, hyphens, apostrophes, '&' or full stops: all that whole-word matching can find."""

_COMMON_WORDS = "a an the of in on at by with and or is are it its his her their this that to from for style background"
_TOO_COMMON = frozenset(_COMMON_WORDS.split())
_GAP = r"[\s_\-\u2010-\u2013]+"
"""What may stand between the words of one term: blanks, underscores, hyphens."""
_SLOT = re.compile(r"\{([^{}]*)\}")

_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
}
_UNCHANGED = frozenset({"deer", "sheep", "fish", "aircraft", "watercraft", "elk", "moose"})


class Concept(BaseModel):
    """One concept to erase. Use `load_concept` to read one; every rule below also holds for one made in code."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    """Id of the concept, [a-z0-9_-]+."""
    kind: Kind
    names: tuple[str, ...]
    """Words by which prompts ask for it; explicit concepts have several."""
    synonyms: tuple[str, ...] = ()
    """Other words for it: filtered from captions, and asked for when generality is evaluated."""
    filter_terms: tuple[str, ...] = ()
    """Further words that are taken out of captions."""
    replacement: str = ""
    """Harmless noun that takes the place of names and synonyms in captions; '' drops the phrase."""
    templates: tuple[str, ...]
    """Prompts with '{name}' (the concept, or a neighbour in its place) and other {slots}."""
    held_out_templates: tuple[str, ...] = ()
    """Wordings for evaluation only."""
    slots: dict[str, tuple[str, ...]] = {}
    """Fillings of the other placeholders."""
    keep: tuple[str, ...] = ()
    """Neighbours that must stay: they fill '{name}'."""
    keep_prompts: tuple[str, ...] = ()
    """Further whole prompts whose images must stay as they are."""
    labels: tuple[str, ...] = ()
    """What a judge chooses among; contains `names` and `keep`."""
    train: dict[str, Any] = {}
    """Settings of VSafe-DPO (TrainConfig) that suit it better than those of its kind (defaults.py)."""
    pairs: dict[str, Any] = {}
    """Likewise of PairConfig, for every method."""

    @field_validator(
        "names", "synonyms", "filter_terms", "templates", "held_out_templates", "keep", "keep_prompts", "labels",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _lists_become_tuples(cls, value: Any, info: ValidationInfo) -> Any:
        return _as_tuple(value, str(info.field_name))

    @field_validator("train", "pairs")
    @classmethod
    def _settings_are_such(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        try:
            (TrainConfig if info.field_name == "train" else PairConfig).model_validate(value)
        except ValidationError as error:
            raise UserError("; ".join(_problem(details) for details in error.errors(include_url=False))) from error
        return value

    @field_validator("slots", mode="before")
    @classmethod
    def _slots_become_tuples(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {slot: _as_tuple(fillings, f"slots.{slot}") for slot, fillings in value.items()}
        raise UserError(f"slots must map a slot to its fillings, such as background: [red, blue], not {value!r}")

    @model_validator(mode="after")
    def _check(self) -> Concept:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"name {self.name!r} must be 1 to 64 characters of a-z, 0-9, '_' and '-'")
        for field in ("names", "templates"):
            if not getattr(self, field):
                raise UserError(f"{field} is empty: give at least one")
        for field, value in self:
            if isinstance(value, tuple):
                _no_blanks_or_doubles(field, value)
        self._check_terms()
        self._check_templates()
        self._check_kept()
        return self

    def _check_terms(self) -> None:
        for term in self.names + self.synonyms + self.filter_terms:
            if not _TERM.fullmatch(term) or len(term) > 80:
                raise UserError(
                    f"term {term!r} can never occur in a caption: write plain words joined by single spaces, "
                    "hyphens or apostrophes, at most 80 characters, no wildcards"
                )
            if term.lower() in _TOO_COMMON or len(term) == 1:
                raise UserError(f"term {term!r} stands in nearly every caption: give a word of the concept itself")
        if found := self.mentions(self.replacement):
            raise UserError(
                f"replacement {self.replacement!r} is itself filtered, as {found[0]!r}: name something else"
            )

    def _check_templates(self) -> None:
        used: set[str] = set()
        for template in self.templates + self.held_out_templates:
            if _SLOT.sub("", template).count("{") or _SLOT.sub("", template).count("}"):
                raise UserError(f"template {template!r} has an unpaired brace")
            placeholders = _SLOT.findall(template)
            if "name" not in placeholders:
                raise UserError(f"template {template!r} has no {{name}}")
            for slot in placeholders:
                if slot != "name" and slot not in self.slots:
                    known = ", ".join(sorted(self.slots)) or "none"
                    raise UserError(f"template {template!r} has the unknown slot {{{slot}}}: known are name, {known}")
            used.update(placeholders)
            if found := self.mentions(_SLOT.sub(" , ", template)):
                raise UserError(f"template {template!r} says {found[0]!r} by itself: neighbours could not use it")
        if both := set(self.templates) & set(self.held_out_templates):
            raise UserError(f"template {min(both)!r} is both in templates and in held_out_templates")
        for slot, fillings in self.slots.items():
            if slot not in used:
                raise UserError(f"slot {slot!r} is used by no template")
            if not fillings:
                raise UserError(f"slot {slot!r} is empty: give at least one filling")
            _no_blanks_or_doubles(f"slots.{slot}", fillings)

    def _check_kept(self) -> None:
        kept = [("keep", name) for name in self.keep] + [("keep_prompts", prompt) for prompt in self.keep_prompts]
        kept += [(f"slots.{slot}", filling) for slot, fillings in self.slots.items() for filling in fillings]
        for field, text in kept:
            if found := self.mentions(text):
                raise UserError(f"{field} holds {text!r}, but {found[0]!r} is a term of the concept: it cannot be both")
        for prompt in self.keep_prompts:
            if "{" in prompt or "}" in prompt:
                raise UserError(f"keep_prompts are whole prompts: {prompt!r} holds a brace")
        for field in ("names", "keep"):
            if self.labels and (missing := [name for name in getattr(self, field) if name not in self.labels]):
                raise UserError(
                    f"{field} holds {missing[0]!r}, which the judge does not know; it knows: {', '.join(self.labels)}"
                )

    def terms(self) -> tuple[str, ...]:
        """Every word of the concept once (names, synonyms, filter terms), longest first."""
        words = dict.fromkeys(self.names + self.synonyms + self.filter_terms)
        return tuple(sorted(words, key=lambda term: (-len(term), term)))

    def mentions(self, text: str) -> tuple[str, ...]:
        """The terms that stand in `text` as whole words, in order of appearance, each once.

        Letter case, plurals, possessives, and hyphens instead of spaces make no difference.
        """
        terms = self.terms()
        found = re.finditer(named_pattern(terms), text, re.IGNORECASE)
        return tuple(dict.fromkeys(terms[int(str(match.lastgroup)[1:])] for match in found))


def load_concept(name_or_path: str, base: str = "emoji_world") -> Concept:
    """Reads a concept of the catalogue by name, or a user's own from the path of a .yaml file.

    `base` picks the catalogue and its defaults: 'emoji_world' for the embedded model; anything else is a real
    model. Raises UserError for an unknown name (with close matches), an unreadable file, an unknown key or
    any rule of `Concept` that is broken.
    """
    folder = _folder(base)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = catalogue(base)
        if name_or_path not in known:
            close = difflib.get_close_matches(name_or_path.lower(), known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise UserError(
                f"unknown concept {name_or_path!r}.{hint} The catalogue of {folder.name} holds: {', '.join(known)}; "
                "or give the path of a .yaml file of your own"
            )
        path = folder / f"{name_or_path}.yaml"
    given = {"name": path.stem, **_read_yaml(path)}
    if unknown := sorted(set(given) - set(Concept.model_fields)):
        raise UserError(f"{path}: unknown key {unknown[0]!r}; allowed are {', '.join(Concept.model_fields)}")
    try:
        return Concept(**_with_defaults(given, _read_yaml(folder / DEFAULTS_FILE)))
    except ValidationError as error:
        problems = (_problem(details) for details in error.errors(include_url=False, include_input=False))
        raise UserError(f"{path}: {'; '.join(problems)}") from error


def catalogue(base: str = "emoji_world") -> list[str]:
    """Names of the concepts that ship for `base`, sorted."""
    return sorted(path.stem for path in _folder(base).glob("*.yaml") if path.name != DEFAULTS_FILE)


def plural(noun: str) -> str:
    """The plural of an English noun phrase, by its last word."""
    head, _, last = noun.rpartition(" ")
    lower = last.lower()
    if lower in _UNCHANGED:
        many = last
    elif lower in _IRREGULAR:
        many = last[0] + _IRREGULAR[lower][1:]
    elif re.search(r"[^aeiou]y$", lower):
        many = last[:-1] + "ies"
    elif re.search(r"(?:l|kni|wi|li|lea|thie|loa|shea)fe?$", lower) and not lower.endswith("ff"):
        many = re.sub(r"fe?$", "ves", last)
    else:
        many = last + ("es" if re.search(r"(?:s|x|z|ch|sh)$", lower) else "s")
    return f"{head} {many}" if head else many


@lru_cache(maxsize=256)
def words_pattern(terms: tuple[str, ...]) -> str:
    """A regular expression for any of the terms as whole words, singular or plural; for use without case.

    Digits and letters on either side hold a match off; an underscore, a hyphen or an apostrophe does not.
    """
    return rf"(?<![^\W_])(?:{'|'.join(_one(term) for term in terms)})(?![^\W_])"


@lru_cache(maxsize=256)
def named_pattern(terms: tuple[str, ...]) -> str:
    """As `words_pattern`, each term in a group 't<index>', so that a match says which term it is."""
    named = "|".join(f"(?P<t{i}>{_one(term)})" for i, term in enumerate(terms))
    return rf"(?<![^\W_])(?:{named})(?![^\W_])"


def _one(term: str) -> str:
    forms = sorted({term, plural(term), f"{term}s"}, key=lambda form: (-len(form), form))
    return "|".join(_GAP.join(re.escape(word) for word in re.split("[ -]", form)) for form in forms).replace(
        "'", "['\u2019]"
    )


_VOWEL_SOUND = re.compile(
    r"(?!uni(?![dmn])|us[aeiu]|eu|ewe|ut[eio]|ur[aei]n|ubiq|uku|u-|one\b|once)[aeiou]|hours?\b|hourly|hourglass|honou?r"
    r"|honest|heir",
    re.IGNORECASE,
)


def fix_articles(text: str) -> str:
    """Writes 'a' or 'an' as the sound of the following word wants it.

    Words that begin with a digit or stand in capitals ('SUV') keep the article they have: how they are read
    cannot be seen. A capital 'A' counts as an article only where a sentence begins.
    """

    def agree(match: re.Match[str]) -> str:
        article, between, word = match.groups()
        if word.isupper() and len(word) > 1:
            return match.group()
        return article[0] + ("n" if _VOWEL_SOUND.match(word) else "") + between + word

    return re.sub(
        r"((?<![\w'\u2019-])an?|(?:(?<=[.!?:\"'(] )|(?<=[\"'(])|^)An?)(\s+[\"'(]?)([^\W\d_][\w-]*)", agree, text
    )


def _folder(base: str) -> Path:
    return CATALOGUE / "emoji_world" if base.replace("-", "_") == "emoji_world" else CATALOGUE


def _with_defaults(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fills in from the folder's slots.yaml what the concept's own file leaves open."""
    kind = given.get("kind")
    filled = dict(given)
    for field in ("templates", "held_out_templates", "keep_prompts"):
        if field not in given and (field == "keep_prompts" or "templates" not in given):
            filled[field] = defaults.get(field, {}).get(kind, [])
    known = defaults.get("labels", {}).get("styles" if kind == "style" else "objects", [])
    names = [name for name in given.get("names") or [] if isinstance(name, str)]
    if "keep" not in given and kind != "explicit":
        filled["keep"] = [label for label in known if label not in names]
    if "labels" not in given and defaults.get("closed"):
        filled["labels"] = known  # the base model draws nothing else: an unknown name is a mistake
    elif "labels" not in given:
        filled["labels"] = list(
            dict.fromkeys([*(known if kind != "explicit" else []), *names, *filled.get("keep", [])])
        )
    own = given.get("slots") or {}
    if isinstance(own, dict):
        texts = [*(filled["templates"] or []), *(filled.get("held_out_templates") or [])]
        used = {slot for text in texts if isinstance(text, str) for slot in _SLOT.findall(text)}
        shared = {slot: fillings for slot, fillings in defaults.get("slots", {}).items() if slot in used}
        filled["slots"] = {**shared, **own}
    return filled


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the concept file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from error
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items()}
    raise UserError(f"{path} must hold 'key: value' lines, such as 'names: [deer]'")


def _as_tuple(value: Any, field: str) -> Any:
    if isinstance(value, list | tuple):
        return tuple(value)
    raise UserError(f"{field} must be a list, such as {field}: [first, second], not {value!r}")


def _no_blanks_or_doubles(field: str, values: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for value in values:
        if not value.strip() or value != value.strip() or "\n" in value:
            raise UserError(f"{field} holds {value!r}: blank, or with blanks around it, or over several lines")
        if value.lower() in seen:
            raise UserError(f"{field} holds {value!r} twice")
        seen.add(value.lower())


def _problem(details: Any) -> str:
    where = ".".join(str(part) for part in details["loc"])
    message = details["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
