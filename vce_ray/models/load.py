"""Finds and loads a base model: the embedded one, a checkpoint folder here or in a store, or a hub id.

torch is imported only where a model is really loaded: drivers that merely name one start fast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from uuid import uuid4

from pyarrow import fs

from vce_ray.env import MODEL_CACHE
from vce_ray.errors import UserError
from vce_ray.storage.store import Store

EMBEDDED = "emoji-world"
"""Name of the model that is shipped in the package."""
KNOWN = ("janus", "llamagen")
"""What `model_type` of a checkpoint's config.json may be."""
_HERE = Path(__file__).parent / "emoji_world"
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def model_folder(ref: str) -> Path:
    """The checkpoint folder of `ref`: 'emoji-world', a local folder, a store's, or a hub id, downloaded once.

    A hub id is 'owner/name', or 'owner/name@revision' to pin a commit, tag or branch; a store's folder is
    's3://bucket/folder'.

    Raises:
        UserError: nothing of that name is known here.
        StoreError: the store cannot be reached.
    """
    if ref == EMBEDDED:
        return _HERE / "janus"
    if "://" in ref:
        folder = _from_store(ref)
    elif Path(ref).is_dir():
        folder = Path(ref)
    elif ref.count("/") == 1 and not ref.startswith((".", "/")):
        from huggingface_hub import snapshot_download

        name, _, revision = ref.partition("@")
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_PATTERNS))
    else:
        raise UserError(
            f"unknown base model {ref!r}: give {EMBEDDED!r}, a checkpoint folder, s3://bucket/folder, "
            "or a hub id 'owner/name[@revision]'"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"model folder {ref!r} has no config.json: give a checkpoint in transformers' format")
    return folder


def _from_store(ref: str) -> Path:
    """A store's folder, copied once to each machine; it is copied anew where a file of it has changed."""
    store = Store(ref)
    selector = fs.FileSelector(store.root, recursive=True, allow_not_found=True)
    found = store.attempt("listing", "", lambda: store.filesystem.get_file_info(selector))
    files = sorted((info.path, info.size, str(info.mtime)) for info in found if info.is_file)
    key = hashlib.blake2b(repr([store.uri, files]).encode(), digest_size=8).hexdigest()
    folder = Path(MODEL_CACHE.get()).expanduser() / key
    if files and not folder.exists():
        aside = folder.with_name(f"{key}.{uuid4().hex}")  # another process may be copying the same
        try:
            store.attempt("fetching", "", lambda: fs.copy_files(store.root, str(aside), store.filesystem))
            aside.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def folder_revision(folder: Path) -> str:
    """16 hex digits over the contents of weights, configs and tokenizer of a checkpoint folder."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def model_config(folder: Path) -> dict:
    """The config.json of a checkpoint folder. Raises UserError where it is of no model that is known here."""
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    if kind == "multi_modality":
        raise UserError(
            f"{folder} is a Janus in DeepSeek's own format: give its conversion for transformers, "
            "such as deepseek-community/Janus-Pro-7B"
        )
    if kind not in KNOWN:
        raise UserError(f"{folder / 'config.json'} has model_type {kind!r}: known are {', '.join(KNOWN)}")
    return config


def model_dtype(config: dict) -> str:
    """The dtype that a checkpoint names and is loaded in: float32 for the embedded model, bfloat16 for Janus-Pro."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def reads_images(ref: str) -> bool:
    """Whether a model can describe pictures. Raises UserError where it is unknown."""
    return model_config(model_folder(ref))["model_type"] == "janus"


def base_stamp(ref: str) -> dict[str, str]:
    """What cached log-probs depend on: revision of weights and tokenizer, and the dtype they are computed in."""
    folder = model_folder(ref)
    return {"base_revision": folder_revision(folder), "dtype": model_dtype(model_config(folder))}


def check_stamp(found: dict, wanted: dict[str, str]) -> None:
    """Raises UserError where cached log-probs were computed by another base, naming both."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"reference log-probs were computed with {key} {found.get(key)}, this run has {value}: "
                "delete the reference/ stage of the run, or load the base it was made with"
            )


def judge_folder(ref: str = EMBEDDED, judge: str | None = None) -> Path:
    """The folder of the judge, a CLIP in open_clip's format: the one that is named, or the embedded model's own.

    Raises:
        UserError: the base is another than the embedded one and no judge is named.
    """
    if judge is None and ref != EMBEDDED:
        raise UserError(f"base model {ref!r} has no judge: name one, a CLIP in open_clip's folder format (--judge)")
    return Path(judge) if judge else _HERE / "judge"


@cache
def base_model(ref: str):
    """A base as it is, loaded once in a process: its steps share it, so nobody may train it or put an adapter on it."""
    return load_model(ref)


def load_model(ref: str = EMBEDDED, device: str | None = None, adapter: Path | None = None, dtype: str | None = None):
    """Loads a base model to draw with, and merges an adapter into it where one is given.

    Args:
        device: the GPU that this process sees by default, else the CPU.
        dtype: of the weights, such as 'bfloat16'; the one that the checkpoint names by default.

    Raises:
        UserError: unknown reference, or the adapter was made for another revision of the base.
    """
    import torch

    folder = model_folder(ref)
    config = model_config(folder)
    if config["model_type"] == "llamagen":
        from vce_ray.models.llamagen.model import LlamaGen as Model
    else:
        from vce_ray.models.janus import Janus as Model
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = Model.from_folder(folder, where, getattr(torch, dtype or model_dtype(config)))
    if adapter is not None:
        from vce_ray.models.adapter import attach_adapter, merge_adapter  # peft takes seconds to import

        attach_adapter(model, adapter)
        merge_adapter(model.net)
    return model
