"""Locate the checkpoint folder of a base model: the embedded one, a local folder, one in object storage, or a hub id.

Nothing here imports torch, and object storage is imported on first use, so that the command line starts quickly.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from vce_ray.config import EMBEDDED
from vce_ray.env import MODEL_CACHE
from vce_ray.errors import UserError, quote
from vce_ray.models.checkpoint import AUTO, check_weights, config_dtype, stored_dtype

CONFIG = "config.json"
_EMBEDDED_FOLDER = Path(__file__).parent / "emoji_world" / "janus"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def model_folder(ref: str) -> Path:
    """Return the local checkpoint folder of a base model, downloading it on first use.

    Args:
        ref: `EMBEDDED`, a local folder, 's3://bucket/folder' or 'gs://bucket/folder', or a hub id: 'owner/name', or
            'owner/name@revision' to pin a commit, tag or branch.

    Raises:
        UserError: the reference has none of these forms, or the folder has no config.json.
        StoreError: the object store cannot be reached.
    """
    source = source_of(ref)
    if source == "embedded":
        folder = _EMBEDDED_FOLDER
    elif source == "store":
        folder = _download_from_store(ref)
    elif source == "folder":
        folder = Path(ref)
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        name, revision = _split_hub_id(ref)
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
        except (HFValidationError, OSError) as error:
            raise _not_on_hub(ref, error) from error
    if not (folder / CONFIG).exists():
        raise _no_config(ref)
    return folder


def local_folder(ref: str) -> Path | None:
    """Return the folder of a base model that is on this machine; None for one in a store or on the hub.

    Raises:
        UserError: the reference has none of the accepted forms.
    """
    source = source_of(ref)
    if source in ("store", "hub"):
        return None
    return _EMBEDDED_FOLDER if source == "embedded" else Path(ref)


def resolve_base(base: str) -> str:
    """Return `base` as other processes can resolve it: relative folders become absolute.

    Raises:
        UserError: the base is unknown, or its weights are missing, incomplete or damaged.
    """
    folder = model_folder(base)
    check_weights(folder)
    return str(folder.absolute()) if Path(base).is_dir() else base


def base_config(ref: str) -> dict[str, Any]:
    """Return the config.json of a base model without downloading its weights.

    A config read from a hub or an object store is cached for the life of the process.

    Args:
        ref: as for `model_folder`.

    Raises:
        UserError: the reference has none of the accepted forms, or there is no config.json.
        StoreError: the object store cannot be reached.
    """
    folder = local_folder(ref)
    if folder is None:
        return _parsed(ref, _remote_config(ref))
    if not (folder / CONFIG).exists():
        raise _no_config(ref)
    return _parsed(ref, (folder / CONFIG).read_bytes())


def _parsed(ref: str, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{CONFIG} of {ref} is not JSON ({error}): download the checkpoint again") from error
    if not isinstance(config, dict):
        raise UserError(f"{CONFIG} of {ref} holds no settings but {quote(config)}: download the checkpoint again")
    return config


@cache
def _remote_config(ref: str) -> bytes:
    """Return the content of a config.json kept in an object store or on the hub."""
    if source_of(ref) == "store":
        from vce_ray.storage.store import Store

        store = Store(ref)
        if not store.exists(CONFIG):
            raise _no_config(ref)
        return store.read_bytes(CONFIG)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    name, revision = _split_hub_id(ref)
    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision)).read_bytes()
    except RemoteEntryNotFoundError as error:
        raise _no_config(ref) from error
    except (HFValidationError, OSError) as error:
        raise _not_on_hub(ref, error) from error


def source_of(ref: str) -> Literal["embedded", "store", "folder", "hub"]:
    """Classify a base model's reference, without network access.

    Raises:
        UserError: it has none of the accepted forms, or is a folder that does not exist.
    """
    if ref == EMBEDDED:
        return "embedded"
    if "://" in ref:
        from vce_ray.storage.files import parse_bucket_uri

        if parse_bucket_uri(ref) is None:  # which refuses credentials, before any message can repeat them
            raise UserError(
                f"base model {ref.partition('://')[0]}://...: give s3://bucket/folder or gs://bucket/folder"
            )
        return "store"
    if os.path.isdir(ref):  # unlike Path.is_dir, False for names that no file can have
        return "folder"
    if os.path.isfile(ref):
        gguf = "GGUF files are quantized and cannot be used; " if ref.endswith(".gguf") else ""
        raise UserError(f"base model {quote(ref)} is a file: {gguf}give a folder with {CONFIG} and *.safetensors")
    if ref.count("/") == 1 and not ref.startswith((".", "/")):
        return "hub"
    raise UserError(
        f"unknown base model {quote(ref)}: give {EMBEDDED!r}, a checkpoint folder, s3://bucket/folder, "
        "or a hub id 'owner/name[@revision]'"
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
        return _split_hub_id(ref)
    if source == "embedded":
        return ref, None
    path = os.path.abspath(ref) if source == "folder" else ref.partition("?")[0]
    return Path(path).name, None


def _split_hub_id(ref: str) -> tuple[str, str | None]:
    """Split 'owner/name@revision' into the id and the revision; None if no revision is given."""
    name, _, revision = ref.partition("@")
    return name, revision or None


def _not_on_hub(ref: str, error: Exception) -> UserError:
    """Return the error for a hub id that cannot be fetched: misspelt, private, gated, or the hub is out of reach."""
    reason = next(filter(None, (line.strip() for line in str(error).splitlines())), type(error).__name__)
    return UserError(
        f"{ref!r} cannot be fetched from the hub ({reason}): check id and revision, set HF_TOKEN if it is private or "
        "gated, or give a folder"
    )


def _no_config(ref: str) -> UserError:
    diffusers = os.path.isfile(os.path.join(ref, "model_index.json"))
    beside = ", but a model_index.json: it is a pipeline of diffusers, not an autoregressive model" if diffusers else ""
    return UserError(f"model folder {ref!r} has no {CONFIG}{beside}: give a checkpoint in transformers' format")


def _download_from_store(ref: str) -> Path:
    """Copy a folder from an object store to this machine's model cache and return the copy.

    The cache key covers the path, size and modification time of every file, so a changed folder is copied again.
    """
    from pyarrow import fs

    from vce_ray.storage.store import Store

    store = Store(ref)
    selector = fs.FileSelector(store.root, recursive=True, allow_not_found=True)
    infos = store.attempt("listing", "", lambda: store.filesystem.get_file_info(selector))
    files = sorted((info.path, info.size, str(info.mtime)) for info in infos if info.is_file)
    key = hashlib.blake2b(repr([store.uri, files]).encode(), digest_size=8).hexdigest()
    folder = Path(MODEL_CACHE.get()).expanduser() / key
    if files and not folder.exists():
        # Several processes of a machine may copy the same model at once: each copies into a folder of its own, and
        # the rename, which is atomic, lets the first one win.
        partial = folder.with_name(f"{key}.{uuid4().hex}")
        try:
            store.attempt("fetching", "", lambda: fs.copy_files(store.root, str(partial), store.filesystem))
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these two: another process finished first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def folder_revision(folder: Path) -> str:
    """Hash the weights, configs and tokenizer of a checkpoint folder: 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
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
    """Return what cached log-probs depend on: the revision of weights and tokenizer, and the dtype of the pass."""
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
