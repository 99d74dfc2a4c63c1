"""Dtypes of a checkpoint and the state of its weights.

Reads config.json and the headers of safetensors. Only `load_complete` loads weights, and nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from vce_ray.errors import UserError, cut, quote

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes that weights may have, by their names in safetensors."""
AUTO = "auto"
"""Dtype that stands for the one in which the weights are stored."""
SHOWN = 3
"""Names of tensors or files that a message lists."""
_AGAIN = "download the checkpoint again"


def config_dtype(config: dict[str, Any]) -> str:
    """Return the dtype named by a config.json: 'float32' for the embedded model, AUTO if it names none."""
    return str(config.get("dtype") or config.get("torch_dtype") or AUTO).removeprefix("torch.")


def check_config(config: dict[str, Any], ref: str) -> None:
    """Raise UserError if the config.json of `ref` tells that the weights are quantized, or of a dtype not supported."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for quantization in (part["quantization_config"] for part in parts if part.get("quantization_config")):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"the weights of {ref} are quantized ({method or 'by an unnamed method'}, quantization_config in its "
            "config.json), which is not supported: give the checkpoint that it was made from"
        )
    if config_dtype(config) not in (AUTO, *STORED.values()):
        raise UserError(
            f"config.json of {ref} has dtype {quote(config_dtype(config))}: known are {', '.join(STORED.values())}, "
            f"and {AUTO} for that of the stored weights"
        )


def check_headers(folder: Path) -> None:
    """Check that the safetensors of a checkpoint are as long as their headers say. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is cut off or damaged ({cut(str(error))})", _AGAIN) from error


def stored_dtype(folder: Path) -> str:
    """Return the dtype in which most of the weights of a checkpoint are stored.

    Raises:
        UserError: it is none of STORED.
    """
    from safetensors import safe_open

    sizes: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for part in map(file.get_slice, file.keys()):
                sizes[part.get_dtype()] += prod(part.get_shape())
    kind = sizes.most_common(1)[0][0] if sizes else "nothing"
    if kind not in STORED:
        raise UserError(f"the weights in {folder} are stored as {kind}: known are {', '.join(STORED.values())}")
    return STORED[kind]


def without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json without dtypes, of which transformers cannot read all forms ('auto', 'torch.bfloat16')."""
    parts = {key: without_dtypes(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in parts.items() if key not in ("dtype", "torch_dtype")}


def load_complete(model_class: Any, folder: Path, dtype: Any, **options: Any) -> Any:
    """Load a checkpoint of transformers, whose own loader leaves weights that are not in the files random.

    Args:
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: a tensor is missing, or of another shape than config.json says.
    """
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        net, info = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    misshapen = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    faults = {"missing": sorted(info["missing_keys"]), "of another shape": sorted(misshapen)}
    if parts := [f"{len(names)} {fault} ({first(names)})" for fault, names in faults.items() if names]:
        raise UserError(f"the weights in {folder} do not fit its config.json: {', '.join(parts)}: {_AGAIN}")
    return net


def first(names: list[str]) -> str:
    """Return the first names of a list, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
