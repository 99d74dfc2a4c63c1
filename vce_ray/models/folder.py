"""Locate the folder of a model: the embedded one, a local folder, one in a store (stored.py), or a hub id (hub.py).

Nothing here imports torch, and object storage is imported on first use, so that the command line starts quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vce_ray.config import EMBEDDED
from vce_ray.errors import UserError, quote
from vce_ray.models.checkpoint import AUTO, config_dtype, stored_dtype
from vce_ray.models.hub import hub_folder, hub_text, split_id
from vce_ray.models.stored import store_folder
from vce_ray.models.template import prompt_form

CONFIG = "config.json"
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that git without LFS writes in place of a large one."""
LFS_POINTER_BYTES = 1024
"""No pointer is larger."""
LARGE_SUFFIXES = (".safetensors", ".bin", ".model", "tokenizer.json")
"""Ends of the names of files that repositories keep in LFS."""


@dataclass(frozen=True)
class Kind:
    """A kind of model: what messages call it, and which files make up its folder."""

    role: str
    """What it is to a run: base model, judge."""
    config: str
    """File that every folder of this kind has."""
    format: str
    """The format of the folder, for messages."""
    patterns: tuple[str, ...]
    """Files to fetch from the hub."""
    embedded: Path | None = None
    """The one that ships with the package."""


BASE = Kind(
    "base model",
    CONFIG,
    "a checkpoint in transformers' format",
    ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"),
    Path(__file__).parent / "emoji_world" / "janus",
)


class NoConfig(UserError):
    """A model lacks the config of its kind."""


def model_folder(ref: str, kind: Kind = BASE) -> Path:
    """Return the local folder of a model, downloading it on first use.

    Args:
        ref: `EMBEDDED`, a local folder, 's3://bucket/folder' or 'gs://bucket/folder', or a hub id: 'owner/name', or
            'owner/name@revision' to pin a commit, tag or branch.
        kind: the kind of model; a base model by default.

    Raises:
        UserError: the reference has none of these forms, the model cannot be fetched, its config is missing, or its
            files are Git LFS pointers.
        StoreError: the object store cannot be reached.
    """
    source = source_of(ref, kind)
    if source == "embedded":
        assert kind.embedded is not None, "source_of has looked for it"
        return kind.embedded
    if source == "store":
        folder = store_folder(ref)
    elif source == "folder":
        folder = Path(ref)
    else:
        folder = hub_folder(ref, kind.patterns)
    if not (folder / kind.config).exists():
        raise _no_config(ref, kind)
    if pointers := lfs_pointers(folder):
        raise lfs_error(ref, pointers)
    return folder


def local_folder(ref: str, kind: Kind = BASE) -> Path | None:
    """Return the folder of a model that is on this machine; None for one in a store or on the hub.

    Raises:
        UserError: the reference has none of the accepted forms.
    """
    source = source_of(ref, kind)
    if source in ("store", "hub"):
        return None
    return kind.embedded if source == "embedded" else Path(ref)


def absolute(ref: str) -> str:
    """Return a reference as processes with another working directory can resolve it."""
    return str(Path(ref).absolute()) if ref != EMBEDDED and Path(ref).is_dir() else ref


def base_config(ref: str) -> dict[str, Any]:
    """Return the config.json of a base model without downloading its weights."""
    return model_config(ref, BASE)


def model_config(ref: str, kind: Kind) -> dict[str, Any]:
    """Return the config of a model without downloading its weights.

    A config read from a hub or an object store is cached for the life of the process.

    Args:
        ref: as for `model_folder`.
        kind: the kind of model, whose `config` is read.

    Raises:
        UserError: the reference has none of the accepted forms, the config is missing or not a JSON object.
        StoreError: the object store cannot be reached.
    """
    folder = local_folder(ref, kind)
    if folder is None:
        content = _remote_config(ref, kind)
    elif (folder / kind.config).exists():
        content = (folder / kind.config).read_bytes()
    else:
        raise _no_config(ref, kind)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{kind.config} of {ref} is not JSON ({error})", "download the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{kind.config} of {ref} holds no settings but {quote(config)}", "download the model again")
    return config


@cache
def _remote_config(ref: str, kind: Kind) -> bytes:
    """Return the content of a config kept in an object store or on the hub."""
    if source_of(ref, kind) == "hub":
        text = hub_text(ref, kind.config)
        if text is None:
            raise _no_config(ref, kind)
        return text.encode()
    from vce_ray.storage.store import Store

    store = Store(ref)
    if not store.exists(kind.config):
        raise _no_config(ref, kind)
    return store.read_bytes(kind.config)


def source_of(ref: str, kind: Kind = BASE) -> Literal["embedded", "store", "folder", "hub"]:
    """Classify a model's reference, without network access.

    Raises:
        UserError: it has none of the accepted forms, or is a folder that does not exist.
    """
    if ref == EMBEDDED and kind.embedded is not None:
        return "embedded"
    if "://" in ref:
        from vce_ray.storage.files import parse_bucket_uri

        if parse_bucket_uri(ref) is None:  # which refuses credentials, before any message can repeat them
            raise UserError(
                f"{kind.role} {ref.partition('://')[0]}://...", "give s3://bucket/folder or gs://bucket/folder"
            )
        return "store"
    if os.path.isdir(ref):  # unlike Path.is_dir, False for names that no file can have
        return "folder"
    if os.path.isfile(ref):
        gguf = "GGUF files are quantized and cannot be used; " if ref.endswith(".gguf") else ""
        raise UserError(
            f"{kind.role} {quote(ref)} is a file", f"{gguf}give a folder with {kind.config} and its weights"
        )
    if ref.startswith((".", "/", "~")):
        raise UserError(
            f"unknown {kind.role} {quote(ref)}: there is no such folder on {platform.node()}",
            "give one that exists on every machine, s3://bucket/folder, or a hub id 'owner/name[@revision]'",
        )
    if ref.count("/") == 1:
        return "hub"
    embedded = f"{EMBEDDED!r}, " if kind.embedded is not None else ""
    raise UserError(
        f"unknown {kind.role} {quote(ref)}",
        f"give {embedded}a folder, s3://bucket/folder, or a hub id 'owner/name[@revision]'",
    )


def published_name(ref: str) -> tuple[str, str | None]:
    """Return a base's name and revision as an adapter that is shared names them.

    That of a hub id is the id. Of any other reference it is the last part alone: paths and buckets concern nobody else.
    The revision is that of a hub id, None if none was given.

    Raises:
        UserError: as `source_of` does.
    """
    source = source_of(ref)
    if source == "hub":
        return split_id(ref)
    if source == "embedded":
        return ref, None
    path = os.path.abspath(ref) if source == "folder" else ref.partition("?")[0]
    return Path(path).name, None


def _no_config(ref: str, kind: Kind) -> NoConfig:
    diffusers = os.path.isfile(os.path.join(ref, "model_index.json"))
    beside = ", but a model_index.json: it is a pipeline of diffusers, not an autoregressive model" if diffusers else ""
    return NoConfig(f"{kind.role} {ref!r} has no {kind.config}{beside}", f"give {kind.format}")


def lfs_pointers(folder: Path) -> list[str]:
    """Return the names of the files that are Git LFS pointers: what git writes where LFS is not installed."""
    small = (
        path
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(LARGE_SUFFIXES) and path.is_file() and path.stat().st_size <= LFS_POINTER_BYTES
    )
    return [path.relative_to(folder).as_posix() for path in small if path.read_bytes().startswith(LFS_POINTER)]


def lfs_error(ref: str, pointers: Sequence[str]) -> UserError:
    """Return the error for a folder whose files were not fetched from Git LFS."""
    return UserError(
        f"{pointers[0]} of {ref} is a Git LFS pointer, not the file itself",
        "run `git lfs install` and `git lfs pull` in the clone" + (", and upload it again" if "://" in ref else ""),
    )


def folder_revision(folder: Path) -> str:
    """Hash the weights, configs and tokenizer of a checkpoint folder, and the form of its prompts: 16 hex digits.

    Raises:
        UserError: config.json or the chat template is damaged.
    """
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.json")]
    return files_revision(folder, files, prompt_form(folder, base_config(str(folder)).get("model_type")))


def files_revision(folder: Path, files: Iterable[Path], form: str = "") -> str:
    """Hash the names and contents of files in a folder, and `form`: 16 hex digits."""
    digest = hashlib.blake2b(form.encode(), digest_size=8)
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def model_dtype(folder: Path) -> str:
    """Return the dtype that a checkpoint is loaded in: the one its config.json names, or else that of its weights."""
    named = config_dtype(base_config(str(folder)))
    return stored_dtype(folder) if named == AUTO else named


def base_stamp(ref: str) -> dict[str, str]:
    """Return what cached log-probs depend on: the revision of the base, and the dtype of the pass."""
    folder = model_folder(ref)
    return {"base_revision": folder_revision(folder), "dtype": model_dtype(folder)}


def check_stamp(found: dict[str, Any], expected: dict[str, str]) -> None:
    """Check that cached log-probs were computed by this base.

    Raises:
        UserError: they were computed by another one; the message names both.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(
                f"reference log-probs were computed with {key} {found.get(key)}, this run has {value}: "
                "delete the reference/ stage of the run, or load the base it was made with"
            )
