"""Read weights as their authors released them, for conversion: plain tensors only, every name and shape checked."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vce_ray.errors import UserError, cut
from vce_ray.storage.folder import relative_path

SHOWN = 10
"""Mismatched keys that an error lists one by one; the others are only counted."""
Shapes = dict[str, tuple[int, ...]]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the weights in a released `.pt` file: at the top level, or under "model", "module" or "state_dict".

    Raises:
        UserError: the file is missing, contains anything but plain data, or has no named tensors.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        # LlamaGen's training saves its settings beside the weights, as a Namespace: no other class is unpickled
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of plain tensors ({cut(str(error))})") from error
    for name in ("model", "module", "state_dict"):
        if isinstance(found, dict) and name in found:
            found = found[name]
            break
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} contains {type(found).__name__}, expected named tensors")
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key} is of type {type(value).__name__}, expected a tensor")
    return dict(found)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, which may be in several files of safetensors or torch. They stay in the files
    until they are used.

    Raises:
        UserError: a file is missing, damaged or contains anything but tensors, or two files have the same tensor.
    """
    weights: dict[str, Tensor] = {}
    for path in _shards(folder):
        found = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
        if twice := sorted(weights.keys() & found.keys()):
            raise UserError(f"{path} has {twice[0]}, which another file has too: download the checkpoint again")
        weights |= found
    return weights


def _shards(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if index.exists():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
                return [folder / relative_path(name) for name in sorted(names)]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged: download the checkpoint again") from error
        if (folder / whole).exists():
            return [folder / whole]
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor the index of either")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, cut off or damaged ({cut(str(error))}): download it again") from error


def check(weights: Mapping[str, Tensor], expected: Shapes, source: str) -> None:
    """Check the keys and shapes of weights. Raises UserError that lists the mismatches."""
    mismatches = [f"{key} is missing, expected {list(shape)}" for key, shape in expected.items() if key not in weights]
    for key, tensor in weights.items():
        if key not in expected:
            mismatches.append(f"{key} of {list(tensor.shape)} is not expected")
        elif tuple(tensor.shape) != expected[key]:
            mismatches.append(f"{key} is {list(tensor.shape)}, expected {list(expected[key])}")
    if mismatches:
        rest = f"; and {len(mismatches) - SHOWN} more" if len(mismatches) > SHOWN else ""
        raise UserError(f"{source} does not match: {'; '.join(mismatches[:SHOWN])}{rest}")
