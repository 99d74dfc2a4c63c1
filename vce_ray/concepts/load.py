"""Loads concepts from the catalogue that ships with the package, or from a user's own YAML file.

The catalogue is in `vce_ray/concepts/catalogue/`, one YAML file per concept: those for the embedded base model in
its subfolder `emoji_world/`, those for all other base models at the top. `defaults.yaml` in each of the two folders
holds what its concepts share: slot fillings, templates by kind, and the labels that a judge can tell apart. A concept's
own file overrides any of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vce_ray.concepts.concept import SLOT, Concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.config import EMBEDDED, describe
from vce_ray.errors import UserError, quote
from vce_ray.models.words import vocabulary_of
from vce_ray.yaml_file import read_yaml

CATALOGUE = Path(__file__).with_name("catalogue")
DEFAULTS_FILE = "defaults.yaml"


def load_concept(name_or_path: str, base: str = EMBEDDED) -> Concept:
    """Load a concept by its name in the catalogue, or from the path of a .yaml file.

    Args:
        base: base model, which selects the catalogue and its defaults.

    Raises:
        UserError: unknown name (the message lists close matches), unreadable file, unknown key, a broken rule of
            `Concept`, or a word in prompts that a base model with a closed vocabulary does not know.
    """
    folder = catalogue_of(base)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = catalogue(base)
        if name_or_path not in known:
            others = f"The catalogue for {base} holds: {', '.join(known)}; or give the path of your own .yaml file"
            if name_or_path in _names_in(CATALOGUE):
                raise UserError(
                    f"concept {name_or_path!r} is for released models: give one with --base, such as "
                    f"deepseek-community/Janus-Pro-7B. {others}"
                )
            close = difflib.get_close_matches(name_or_path.lower(), known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise UserError(f"unknown concept {quote(name_or_path)}.{hint} {others}")
        path = folder / f"{name_or_path}.yaml"
    values = {"name": path.stem, **_read_yaml(path)}
    if unknown := sorted(set(values) - set(Concept.model_fields)):
        raise UserError(f"{path}: unknown key {quote(unknown[0])}; allowed are {', '.join(Concept.model_fields)}")
    defaults = _defaults_of(folder)
    if defaults.get("closed") and "labels" not in values:
        _check_closed(values, defaults["labels"], str(path))
    try:
        concept = Concept(**_with_defaults(values, defaults))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from error
    if vocabulary := vocabulary_of(base):
        for field, texts in _prompt_texts(concept):
            vocabulary.check(texts, f"{path}: {field}")
    return concept


def catalogue(base: str = EMBEDDED) -> list[str]:
    """Return the names of the concepts that ship for a base model, sorted."""
    return _names_in(catalogue_of(base))


def _names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml") if path.name != DEFAULTS_FILE)


def catalogue_of(base: str) -> Path:
    """Return the catalogue folder for a base model."""
    return CATALOGUE / "emoji_world" if base == EMBEDDED else CATALOGUE


@cache
def _defaults_of(folder: Path) -> dict[str, Any]:
    """Read what the concepts of a catalogue folder share. Callers must not modify it."""
    return _read_yaml(folder / DEFAULTS_FILE)


def _with_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that a concept's own file leaves out from the catalogue's defaults.yaml."""
    kind = values.get("kind")
    filled = dict(values)
    for field in ("templates", "held_out_templates", "keep_prompts"):
        # a concept with its own templates takes no shared ones: neither for training nor held out
        if field not in values and (field == "keep_prompts" or "templates" not in values):
            filled[field] = defaults.get(field, {}).get(kind, [])
    known = defaults.get("labels", {}).get("styles" if kind == "style" else "objects", [])
    names = [name for name in values.get("names") or [] if isinstance(name, str)]
    if "keep" not in values and kind != "explicit":
        filled["keep"] = [label for label in known if label not in names]
    if "labels" not in values and defaults.get("closed"):
        filled["labels"] = known  # the base model draws nothing else, so an unknown name is a mistake
    elif "labels" not in values:
        filled["labels"] = list(
            dict.fromkeys([*(known if kind != "explicit" else []), *names, *filled.get("keep", [])])
        )
    if kind == "explicit" and not defaults.get("closed"):
        filled.setdefault("seen_texts", [fix_articles(f"a photo of a {name}") for name in names])
        filled.setdefault("unseen_texts", defaults["unseen_texts"])
    own_slots = values.get("slots") or {}
    if isinstance(own_slots, dict):
        texts = [*(filled["templates"] or []), *(filled.get("held_out_templates") or [])]
        used = {slot for text in texts if isinstance(text, str) for slot in SLOT.findall(text)}
        shared = {slot: fillings for slot, fillings in defaults.get("slots", {}).items() if slot in used}
        filled["slots"] = {**shared, **own_slots}
    return filled


def _check_closed(values: dict[str, Any], labels: dict[str, list[str]], path: str) -> None:
    """Refuse names and neighbours that are none of the labels of the concept's kind, the only things that are drawn."""
    own, other = ("styles", "objects") if values.get("kind") == "style" else ("objects", "styles")
    for field in ("names", "keep"):
        entries = values.get(field)
        for name in entries if isinstance(entries, list) else ():
            if not isinstance(name, str) or not name.strip() or name in labels[own]:
                continue
            where = f"{path}: {field} contains {quote(name)}, which"
            if name in labels[other]:
                fix = "write a concept for each kind, and erase them with vce-ray fleet"
                if field == "keep":
                    fix = f"remove it from keep, which is for other {own}"
                raise UserError(
                    f"{where} is one of the model's {other}, but a concept of kind {values.get('kind')} is about "
                    f"{own}: {fix}"
                )
            close = difflib.get_close_matches(name.lower()[:80], labels[own], n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise UserError(
                f"{where} is none of the {own} that the model knows{hint}: {', '.join(labels[own])}; its own concepts "
                "are listed by vce-ray concepts"
            )


def _prompt_texts(concept: Concept) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what prompts and questions to the judge are made of, field by field.

    Synonyms and filter terms are only looked for in captions.
    """
    for field in ("names", "keep", "keep_prompts", "seen_texts", "unseen_texts"):
        yield field, getattr(concept, field)
    for field in ("templates", "held_out_templates"):
        yield field, tuple(SLOT.sub("a", template) for template in getattr(concept, field))
    for slot, fillings in concept.slots.items():
        yield f"slots.{slot}", fillings
    yield "label_template", (SLOT.sub("a", concept.label_template),) if concept.label_template else ()
    for field in ("replacement", "stand_in"):
        if noun := getattr(concept, field):
            yield field, (noun,)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises UserError if the file cannot be read or holds something else."""
    content = read_yaml(path)
    if content is None:
        raise UserError(f"{path} is empty: write 'key: value' lines, such as 'names: [deer]'")
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items()}
    raise UserError(f"{path} must hold 'key: value' lines, such as 'names: [deer]'")
