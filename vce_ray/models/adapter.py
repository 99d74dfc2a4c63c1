"""Save and load adapters: LoRA safetensors in PEFT's format, with the revision of the base they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vce_ray.errors import UserError
from vce_ray.models.adapter_location import CARD, read_card
from vce_ray.models.base import ImageModel

TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
"""Modules that get a LoRA: every matrix of the language model's layers. Vision tower, tokenizer and heads get none."""
WEIGHTS = "adapter_model.safetensors"
FULL_WEIGHTS = "weights.safetensors"


def add_lora(net: nn.Module, rank: int, alpha: int) -> None:
    """Add a LoRA to the language model and freeze everything else. A new LoRA does not change the model's output."""
    net.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, net)
    for parameter in net.parameters():
        if parameter.requires_grad:  # in bfloat16, most optimizer steps would be rounded away
            parameter.data = parameter.data.float()


def remove_lora(net: Any) -> None:
    """Remove what `add_lora` added, without merging it: the net is the base again."""
    for name, layer in [(name, part) for name, part in net.named_modules() if isinstance(part, BaseTunerLayer)]:
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())
    del net.peft_config


def save_adapter(folder: Path, state: dict[str, Tensor], base_revision: str, lora: dict | None, facts: dict) -> None:
    """Write an adapter folder: weights, peft's config, and a card with the base's revision.

    Args:
        state: LoRA tensors under peft's names, or, if `lora` is None, all trained weights under their own names.
        lora: rank and alpha, or None for full weights.
        facts: further keys of the card (concept, method, run).
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if lora is None:
        save_file(state, folder / FULL_WEIGHTS)
    else:
        state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        save_file(state, folder / WEIGHTS)
        config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=TARGETS, bias="none")
        config.base_model_name_or_path = base_revision
        config.save_pretrained(str(folder))
    card = {"base_revision": base_revision, "lora": lora} | facts
    (folder / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def attach_adapter(model: ImageModel, folder: Path) -> None:
    """Add a saved adapter to a loaded base model.

    Raises:
        UserError: the adapter was trained on another revision of the base. The message names both.
    """
    card = read_card(folder)
    if card["base_revision"] != model.revision:
        raise UserError(
            f"adapter {folder} was trained on base revision {card['base_revision']}, this base is {model.revision}: "
            "load the base it was trained on, or erase again from this one"
        )
    if card["lora"] is None:
        missing = model.net.load_state_dict(load_file(folder / FULL_WEIGHTS), strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        return
    add_lora(model.net, card["lora"]["rank"], card["lora"]["alpha"])
    prefix = "base_model.model."
    state = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    outcome = set_peft_model_state_dict(model.net, state)
    assert not outcome.unexpected_keys, outcome.unexpected_keys


def merge_adapter(net: nn.Module) -> None:
    """Add the LoRA to the weights it applies to and remove it, so that sampling is as fast as with the base."""
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [(name, x) for name, x in net.named_modules() if isinstance(x, LoraLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        with torch.no_grad():
            # in place, unlike peft's own merge: the weights' version changes, so packed copies are known to be stale
            for adapter in layer.active_adapters:
                base.weight.add_(layer.get_delta_weight(adapter).to(base.weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, base)
