"""Locate, check and download an adapter: a local folder, or one in a store. Importing it loads no library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vce_ray.errors import UserError
from vce_ray.models.folder import folder_revision, model_folder
from vce_ray.storage.folder import FOLDER_INDEX, file_digest, relative_path
from vce_ray.storage.local_folder import local_path, temporary_folder

if TYPE_CHECKING:
    from vce_ray.storage.store import Store

CARD = "vce_ray.json"
"""File of an adapter folder that names the base it belongs to."""
WEIGHTS = "adapter_model.safetensors"
FULL_WEIGHTS = "weights.safetensors"
PEFT_CONFIG = "adapter_config.json"
MODEL_CARD = "adapter/README.md"
"""The adapter's model card in the store of a run. It is written after the evaluation, and the folder index never lists
it, so that the adapter is complete before, and people may edit the card."""


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card of an adapter folder. Raises UserError if the folder has none, or it is damaged."""
    path = folder / CARD
    if not path.exists():
        raise UserError(f"{folder} is not a vce_ray adapter: {CARD} is missing")
    return _checked_card(_read_json(path), str(path))


def weights_file(card: dict[str, Any]) -> str:
    """Return the name of the file that holds the tensors of an adapter."""
    return FULL_WEIGHTS if card["lora"] is None else WEIGHTS


def check_files(folder: Path, card: dict[str, Any]) -> None:
    """Check that the files of a local adapter are there and unchanged. Their tensors are not looked at.

    `Store.upload` writes a folder index with a digest of each file. A folder without an index, such as one written by
    `save_adapter`, is only checked for its weights.

    Raises:
        UserError: a file is missing, or differs from its digest.
    """
    weights, index = weights_file(card), folder / FOLDER_INDEX
    listed = _listed_files(_read_json(index), weights, str(index)) if index.exists() else {weights: None}
    for name, digest in listed.items():
        file = folder / relative_path(name)
        if not file.is_file():
            raise UserError(f"adapter {folder} is incomplete, {name} is missing: fetch the adapter again")
        if digest is not None and file_digest(file) != digest:
            raise UserError(
                f"adapter {folder} is corrupt, {name} differs from its digest in {FOLDER_INDEX}: fetch the adapter "
                f"again, or delete {FOLDER_INDEX} if you changed the file on purpose"
            )


def resolve_adapter(adapter: str) -> str:
    """Return `adapter` as other processes can resolve it: an absolute path, or a store URI with its endpoint."""
    if "://" not in adapter:
        return str(local_path(adapter))
    store, name = _split(adapter)
    return store.child(name).uri


def check_adapter(base: str, adapter: str) -> dict[str, Any]:
    """Return the card of an adapter after checking that it fits the base and that its files are complete.

    The tensors are compared with those of the base when they are loaded (`attach_adapter`).

    Raises:
        UserError: the folder is not an adapter, a local file is missing or corrupt, or the adapter was trained on
            another revision of the base.
        StoreError: the adapter is not in the store, or its upload is incomplete.
    """
    if "://" in adapter:
        store, name = _split(adapter)
        card = _checked_card(store.read_json(f"{name}/{CARD}"), f"{CARD} of {adapter}")
        index = store.read_json(f"{name}/{FOLDER_INDEX}")
        _listed_files(index, weights_file(card), f"{FOLDER_INDEX} of {adapter}")  # fetching checks the digests
    else:
        card = read_card(Path(adapter))
    revision = folder_revision(model_folder(base))
    if card["base_revision"] != revision:
        raise UserError(
            f"adapter {adapter} was trained on base revision {card['base_revision']}, {base} is {revision}: "
            "serve the base it was trained on, or train an adapter for this one"
        )
    if "://" not in adapter:
        check_files(Path(adapter), card)
    return card


@contextmanager
def local_adapter(adapter: str | None) -> Iterator[Path | None]:
    """Yield a local folder with the adapter: the adapter itself if it is local, else a temporary copy. None for None.

    Raises:
        StoreError: the adapter is missing or corrupt, or there is no room for the copy.
    """
    if adapter is None or "://" not in adapter:
        yield Path(adapter) if adapter else None
        return
    store, name = _split(adapter)
    with temporary_folder() as folder:
        yield store.fetch(name, folder / "adapter")


@contextmanager
def run_adapter(store: Store) -> Iterator[Path]:
    """Yield a temporary local copy of the adapter in the store of a run.

    Raises:
        StoreError: the adapter is missing or corrupt. A UserError inside the context, such as one raised on loading the
            copy, becomes a StoreError too, which stops a stage instead of rejecting row after row.
    """
    from vce_ray.storage.errors import StoreError

    with temporary_folder() as folder:
        local = store.fetch("adapter", folder / "adapter")
        try:
            yield local
        except UserError as error:
            raise StoreError(f"{store.where('adapter')} cannot be used: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch the adapter again") from error


def _checked_card(card: Any, where: str) -> dict[str, Any]:
    """Return a card whose fields have the types that `save_adapter` writes. Raises UserError for any other."""
    fix = "fetch the adapter again"
    if not isinstance(card, dict) or not isinstance(card.get("base_revision"), str) or "lora" not in card:
        raise UserError(f"{where} is damaged, it needs base_revision and lora: {fix}")
    lora = card["lora"]
    if lora is not None:
        values = [lora.get(key) for key in ("rank", "alpha")] if isinstance(lora, dict) else []
        if not values or not all(type(value) is int and value >= 1 for value in values):
            raise UserError(f"{where} has lora {lora!r}, not null or rank and alpha of at least 1: {fix}")
    return card


def _listed_files(index: Any, weights: str, where: str) -> dict[str, str]:
    """Return the digests in a folder index. Raises UserError if it does not list the files of an adapter."""
    files = index.get("files") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not {CARD, weights} <= files.keys():
        raise UserError(f"{where} does not list {CARD} and {weights}: fetch or upload the adapter again")
    return files


def _split(uri: str) -> tuple[Store, str]:
    """Split an adapter's URI into its parent store and the name of its folder there."""
    from vce_ray.storage.store import Store  # pyarrow, which a local adapter does not need

    path, mark, query = uri.partition("?")
    parent, _, name = path.rstrip("/").rpartition("/")
    if parent.endswith(("/", ":")) or not name:
        raise UserError(f"{path!r} is not a folder in a store: use the form s3://bucket/run/adapter")
    return Store(parent + mark + query), name
