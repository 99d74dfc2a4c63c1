"""The table of base model families. Adding one takes a folder or module in this package and one line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import UserError, quote
from vce_ray.models.checkpoint import check_config
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
    files: tuple[tuple[str, ...], ...] = ()
    """What its folder has besides config.json and *.safetensors: of each group, at least one."""
    chats: bool = False
    """Whether its folder has a chat template, by which prompts and questions are written (template.py)."""


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "janus",
            "vce_ray.models.janus:Janus",
            {},
            reads_images=True,
            files=(
                ("tokenizer.json", "tokenizer.model"),
                ("tokenizer_config.json",),
                ("processor_config.json", "preprocessor_config.json"),
            ),
            chats=True,
        ),
        Family(
            "llamagen",
            "vce_ray.models.llamagen.model:LlamaGen",
            {"guidance_scale": 7.5, "top_k": 1000},
            reads_images=False,
            files=(
                ("gpt.safetensors",),
                ("vq.safetensors",),
                ("text_encoder/config.json",),
                ("text_encoder/tokenizer.json", "text_encoder/spiece.model"),
            ),
        ),
    )
}
EMBEDDED_SAMPLING = {"guidance_scale": 2.0, "temperature": 0.7}
"""Sampling settings of the embedded model, chosen by measurement (see its model card)."""


def family_of(ref: str) -> Family:
    """Return the family of a base model. Reads its config.json, never its weights.

    Raises:
        UserError: the reference is unknown, its `model_type` is not in FAMILIES, or its weights are quantized.
        StoreError: the object store cannot be reached.
    """
    config = base_config(ref)
    model_type = config.get("model_type")
    if model_type == "multi_modality":
        raise UserError(
            f"{ref} is a Janus in DeepSeek's own format: convert it, `vce-ray convert {ref} --out folder`, or give a "
            "conversion for transformers, such as deepseek-community/Janus-Pro-7B"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{CONFIG} of {ref} has {f'model_type {quote(model_type)}' if model_type else 'no model_type'}: known are "
            f"{', '.join(FAMILIES)}; give a Janus, such as deepseek-community/Janus-Pro-7B, or a converted LlamaGen"
        )
    check_config(config, ref)
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
