"""The table of base model families. Adding one takes a folder or module in this package and one line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.folder import CONFIG, base_config


@dataclass(frozen=True)
class Family:
    """A family of base models. It names its class by import path, so that the table can be read without torch."""

    name: str
    """`model_type` in the checkpoint's config.json."""
    model: str
    """Import path of its class, 'package.module:Class': a subclass of ImageModel with the class method
    `from_folder(folder, device, dtype)`."""
    sampling: Mapping[str, Any]
    """The authors' sampling settings, where they differ from the defaults of SamplingConfig."""
    reads_images: bool
    """Whether it implements `caption`."""


FAMILIES = {
    family.name: family
    for family in (
        Family("janus", "vce_ray.models.janus:Janus", {}, reads_images=True),
        Family(
            "llamagen",
            "vce_ray.models.llamagen.model:LlamaGen",
            {"guidance_scale": 7.5, "top_k": 1000},
            reads_images=False,
        ),
    )
}
EMBEDDED_SAMPLING = {"guidance_scale": 2.0, "temperature": 0.7}
"""Sampling settings of the embedded model, chosen by measurement (see its model card)."""


def family_of(ref: str) -> Family:
    """Return the family of a base model. Reads its config.json, never its weights.

    Raises:
        UserError: the reference is unknown, or its `model_type` is not in FAMILIES.
        StoreError: the object store cannot be reached.
    """
    model_type = base_config(ref).get("model_type")
    if model_type == "multi_modality":
        raise UserError(
            f"{ref} is a Janus in DeepSeek's own format: give its conversion for transformers, "
            "such as deepseek-community/Janus-Pro-7B"
        )
    if model_type not in FAMILIES:
        raise UserError(f"{CONFIG} of {ref} has model_type {model_type!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def reads_images(ref: str) -> bool:
    """Return whether a base model can caption images. Raises UserError if the base is unknown."""
    return family_of(ref).reads_images


def default_sampling(base: str, **settings: Any) -> SamplingConfig:
    """Return the recommended sampling settings of a base model, overridden by `settings`.

    Raises:
        UserError: the base is unknown.
        ValidationError: a setting is unknown or out of range.
    """
    recommended = EMBEDDED_SAMPLING if base == EMBEDDED else family_of(base).sampling
    return SamplingConfig.model_validate({**recommended, **settings})
