"""Finds and loads a base model: the embedded one, a local checkpoint folder or a hub id.

torch is imported only where a model is really loaded: drivers that merely name one start fast.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

EMBEDDED = "emoji-world"
"""Name of the model that is shipped in the package."""
_HERE = Path(__file__).parent / "emoji_world"


def model_folder(ref: str) -> Path:
    """The checkpoint folder of `ref`: 'emoji-world', a local folder, or 'owner/name' on the hub (downloaded once).

    Raises:
        ValueError: nothing of that name is known here.
    """
    if ref == EMBEDDED:
        return _HERE / "janus"
    folder = Path(ref)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"model folder {ref!r} has no config.json: give a checkpoint in transformers' format")
        return folder
    if ref.count("/") == 1 and not ref.startswith((".", "/")):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(ref, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    raise ValueError(f"unknown base model {ref!r}: give {EMBEDDED!r}, a checkpoint folder, or a hub id 'owner/name'")


def folder_revision(folder: Path) -> str:
    """16 hex digits over the contents of weights, configs and tokenizer of a checkpoint folder."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def base_stamp(ref: str) -> dict[str, str]:
    """What cached log-probs depend on: revision of weights and tokenizer, and the dtype they are computed in."""
    return {"base_revision": folder_revision(model_folder(ref)), "dtype": "float32"}


def judge_folder() -> Path:
    """The judge of the embedded model: a CLIP in open_clip's folder format."""
    return _HERE / "judge"


def load_model(ref: str = EMBEDDED, device: str = "cpu", adapter: Path | None = None):
    """Loads a base model to draw with, and merges an adapter into it where one is given.

    Raises:
        ValueError: unknown reference, or the adapter was made for another revision of the base.
    """
    from vce_ray.models.janus import Janus

    model = Janus.from_folder(model_folder(ref), device)
    if adapter is not None:
        from vce_ray.models.adapter import attach_adapter, merge_adapter  # peft takes seconds to import

        attach_adapter(model, adapter)
        merge_adapter(model.net)
    return model
