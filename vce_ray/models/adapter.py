"""Save and load adapters: LoRA safetensors in PEFT's format, with the revision of the base they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vce_ray.errors import UserError
from vce_ray.models.adapter_location import (
    CARD,
    FULL_WEIGHTS,
    PEFT_CONFIG,
    WEIGHTS,
    check_files,
    read_card,
    weights_file,
)
from vce_ray.models.base import ImageModel
from vce_ray.models.folder import published_name
from vce_ray.storage.folder import FOLDER_INDEX

TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
"""Modules that get a LoRA: every matrix of the language model's layers. Vision tower, tokenizer and heads get none."""
PREFIX = "base_model.model."
"""What peft puts before the name of a module in the file of an adapter."""
SHOWN = 3
"""Tensor names that an error message lists."""
_FIX = "fetch the adapter again, or erase again"


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


def save_adapter(folder: Path, state: dict[str, Tensor], model: ImageModel, lora: dict | None, facts: dict) -> None:
    """Write an adapter folder: weights, peft's config, and a card with the base's revision.

    peft and transformers load the folder of a LoRA by themselves if the base is a class of transformers.

    Args:
        state: LoRA tensors under peft's names, or, if `lora` is None, all trained weights under their own names.
        model: the base that was trained: its class, name and revision are written.
        lora: rank and alpha, or None for full weights.
        facts: further keys of the card (concept, method, run).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FOLDER_INDEX).unlink(missing_ok=True)  # digests of files that are replaced here
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if lora is None:
        save_file(state, folder / FULL_WEIGHTS)
    else:
        state = {PREFIX + name: tensor for name, tensor in state.items()}
        save_file(state, folder / WEIGHTS)
        _peft_config(model, lora).save_pretrained(str(folder))
    card = {"base_revision": model.revision, "lora": lora} | facts
    (folder / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def _peft_config(model: ImageModel, lora: dict[str, int]) -> LoraConfig:
    """Return the config with which peft's AutoPeftModel loads base and adapter.

    It has no task type: peft's tasks are those of language models, and none of their Auto classes knows Janus.
    """
    name, revision = published_name(model.ref)
    base = type(model.net)
    known = base.__module__.startswith("transformers.")  # peft would import no class of ours
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=TARGETS,
        bias="none",
        base_model_name_or_path=name,
        revision=revision,
        auto_mapping={"base_model_class": base.__name__, "parent_library": base.__module__} if known else None,
        inference_mode=True,
    )


def attach_adapter(model: ImageModel, folder: Path) -> None:
    """Add a saved adapter to a loaded base model without one.

    The file must hold exactly the tensors that the base and the card call for. Otherwise the model is left unchanged.

    Raises:
        UserError: the adapter was trained on another revision of the base, a file is missing or corrupt, or a tensor is
            missing, unexpected or of another shape. The message names the adapter and the tensors.
    """
    assert not any(isinstance(module, BaseTunerLayer) for module in model.net.modules()), "merge the first adapter"
    card = read_card(folder)
    facts = [f"{key} {card[key]!r}" for key in ("concept", "run") if key in card]  # `folder` may be a temporary copy
    label = f"adapter {folder} ({', '.join(facts)})" if facts else f"adapter {folder}"
    if card["base_revision"] != model.revision:
        raise UserError(
            f"{label} was trained on base revision {card['base_revision']}, this base is {model.revision}: "
            "load the base it was trained on, or erase again from this one"
        )
    check_files(folder, card)
    state = _read_tensors(folder / weights_file(card), label)
    lora = card["lora"]
    if lora is None:
        trained, ignored = _full_shapes(model.net)
        _check_tensors(state, trained, ignored, label)
        outcome = model.net.load_state_dict({name: state[name] for name in trained}, strict=False)
        assert not outcome.unexpected_keys, outcome.unexpected_keys
        return
    _check_peft_config(folder / PEFT_CONFIG, lora, label)
    _check_tensors(state, _lora_shapes(model.net, lora["rank"]), {}, f"{label} of rank {lora['rank']}")
    add_lora(model.net, lora["rank"], lora["alpha"])
    outcome = set_peft_model_state_dict(model.net, {name.removeprefix(PREFIX): x for name, x in state.items()})
    assert not outcome.unexpected_keys, outcome.unexpected_keys
    assert not any("lora_" in name for name in outcome.missing_keys), outcome.missing_keys


def _read_tensors(path: Path, label: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{label}: {path.name} cannot be read ({error}): {_FIX}") from error


def _lora_shapes(net: Any, rank: int) -> dict[str, torch.Size]:
    """Return name and shape of each tensor in the file of a LoRA for this net."""
    shapes = {}
    for name, module in net.named_modules():
        if re.fullmatch(TARGETS, name):  # as peft matches them
            outputs, inputs = module.weight.shape
            shapes[f"{PREFIX}{name}.lora_A.weight"] = torch.Size([rank, inputs])
            shapes[f"{PREFIX}{name}.lora_B.weight"] = torch.Size([outputs, rank])
    return shapes


def _full_shapes(net: Any) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Return names and shapes of the weights that full training changes, and of others that their file may hold.

    The trainer's state dict leaves frozen parameters out, but keeps buffers and the second name of a tied parameter.
    Those equal the base's, so they are not loaded.
    """
    parameters = dict(net.named_parameters())
    modules = (net.model.language_model.layers, net.model.generation_head)
    full = {id(parameter) for module in modules for parameter in module.parameters()}  # names depend on the family
    trained = {name: parameter.shape for name, parameter in parameters.items() if id(parameter) in full}
    return trained, {name: x.shape for name, x in net.state_dict().items() if name not in parameters}


def _check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], ignored: Mapping[str, torch.Size], label: str
) -> None:
    """Raise UserError unless `state` holds the expected tensors and no others than these and the ignored ones."""
    known = {**ignored, **expected}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in known]
    misshapen = [
        f"{name} is {list(x.shape)}, not {list(known[name])}"
        for name, x in state.items()
        if name in known and x.shape != known[name]
    ]
    integer = [f"{name} is {x.dtype}" for name, x in state.items() if name in expected and not x.is_floating_point()]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen, "not of floats": integer}
    parts = [f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names]
    if parts:
        raise UserError(f"{label} does not fit its base, of {len(expected)} tensors: {', '.join(parts)}: {_FIX}")


def _first(names: Iterable[str]) -> str:
    """List the first names."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _check_peft_config(path: Path, lora: dict[str, int], label: str) -> None:
    """Raise UserError if peft would load the adapter with another rank or alpha than the card says."""
    if not path.exists():  # only peft reads it
        return
    try:
        config = json.loads(path.read_text())
        found = {"rank": config["r"], "alpha": config["lora_alpha"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{label}: {path.name} is damaged ({type(error).__name__}: {error}): {_FIX}") from error
    if found != {key: lora[key] for key in found}:
        raise UserError(f"{label}: {CARD} has {lora}, {path.name} has {found}: {_FIX}")


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
