"""Locate the checkpoint folder of a base model: the embedded one, a local folder, one in object storage, or a hub id.

Nothing here imports torch, and object storage is imported on first use, so that the command line starts quickly.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from vce_ray.config import EMBEDDED
from vce_ray.env import MODEL_CACHE
from vce_ray.errors import UserError
from vce_ray.storage.local_folder import local_path, writable_folder

CONFIG = "config.json"
_EMBEDDED_FOLDER = Path(__file__).parent / "emoji_world" / "janus"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def model_folder(ref: str) -> Path:
    """Return the local checkpoint folder of a base model, downloading it on first use.

    Args:
        ref: `EMBEDDED`, a local folder, 's3://bucket/folder' or 'gs://bucket/folder', or a hub id: 'owner/name', or
            'owner/name@revision' to pin a commit, tag or branch.

    Raises:
        UserError: the reference has none of these forms, the folder has no config.json, or the model cache cannot be
            written or has no room.
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


def resolve_base(base: str) -> str:
    """Return `base` as other processes can resolve it: relative folders become absolute.

    Raises:
        UserError: the base is unknown or has no weights.
    """
    folder = model_folder(base)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"base model {base!r} has no weights in {folder}: give a folder with *.safetensors")
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
    source = source_of(ref)
    if source in ("store", "hub"):
        return _parsed(ref, _remote_config(ref, source))
    path = (_EMBEDDED_FOLDER if source == "embedded" else Path(ref)) / CONFIG
    if not path.exists():
        raise _no_config(ref)
    return _parsed(ref, path.read_text())


def _parsed(ref: str, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{CONFIG} of {ref} is not JSON ({error}): download the checkpoint again") from error


@cache
def _remote_config(ref: str, source: Literal["store", "hub"]) -> str:
    """Return the text of a config.json kept in an object store or on the hub."""
    if source == "store":
        from vce_ray.storage.store import Store

        store = Store(ref)
        if not store.exists(CONFIG):
            raise _no_config(ref)
        return store.read_bytes(CONFIG).decode()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    name, revision = _split_hub_id(ref)
    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision)).read_text()
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
    if Path(ref).is_dir():
        return "folder"
    if ref.count("/") == 1 and not ref.startswith((".", "/")):
        return "hub"
    raise UserError(
        f"unknown base model {ref!r}: give {EMBEDDED!r}, a checkpoint folder, s3://bucket/folder, "
        "or a hub id 'owner/name[@revision]'"
    )


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
    return UserError(f"model folder {ref!r} has no {CONFIG}: give a checkpoint in transformers' format")


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
    folder = local_path(MODEL_CACHE.get()) / key
    if files and not folder.exists():
        cache = writable_folder(folder.parent, MODEL_CACHE.name, needed=sum(size for _, size, _ in files))
        # Several processes of a machine may copy the same model at once: each copies into a folder of its own, and
        # the rename, which is atomic, lets the first one win.
        partial = cache / f"{key}.{uuid4().hex}"
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


def model_dtype(config: dict[str, Any]) -> str:
    """Return the dtype named by a config.json: float32 for the embedded model, bfloat16 for Janus-Pro."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def base_stamp(ref: str) -> dict[str, str]:
    """Return what cached log-probs depend on: the revision of weights and tokenizer, and the dtype of the pass."""
    folder = model_folder(ref)
    return {"base_revision": folder_revision(folder), "dtype": model_dtype(base_config(str(folder)))}


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
