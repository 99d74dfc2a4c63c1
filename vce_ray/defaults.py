"""Default settings of a run: by its concept, its training method and its base. Pure: everything is passed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.config import EMBEDDED, TrainConfig
from vce_ray.training.objectives import DEFAULT_METHOD, objective_type

Settings = dict[str, Any]
"""Keys of RunConfig, with sections as dicts; what is left out gets its default."""

STYLE_KEEP = 1280
"""Preservation prompts for a style, four times as many as for an object: a style shares much with other styles, and
fewer images would be memorised."""
LARGE_TRAIN: Settings = {"learning_rate": 1e-4}
"""For bases hundreds of times larger than the embedded model: EAR (arXiv 2506.20151) and Obliviate (arXiv 2606.28643)
train Janus-Pro-7B at this rate. Not measured here."""


def default_settings(concept: Concept, base: str, method: str = DEFAULT_METHOD) -> Settings:
    """Return the settings of a run that its user leaves open, section by section.

    Later ones override earlier ones: the method's for this kind of concept, the base's, the concept's own file (whose
    training settings apply to the method that they were chosen for). Steps grow by a third for each name beyond the
    first, because the names share the pairs.

    Raises:
        UserError: the method is unknown.
    """
    steps = TrainConfig.model_fields["steps"].default * (len(concept.names) + 2) // 3
    train: Settings = {"method": method, "steps": steps} | objective_type(method).defaults(concept.kind)
    if base != EMBEDDED:
        train |= LARGE_TRAIN
    if concept.train.get("method", DEFAULT_METHOD) == method:
        train |= concept.train
    pairs = ({"num_keep": STYLE_KEEP} if concept.kind == "style" else {}) | concept.pairs
    return {"pairs": pairs, "train": train}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Merge settings section by section; values in `above` win."""
    out = dict(below)
    for key, value in above.items():
        out[key] = (
            merged(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
        )
    return out
