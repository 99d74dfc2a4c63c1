"""Locate, check and download an adapter: a local folder, or one in a store. Importing it loads no library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vce_ray.errors import UserError
from vce_ray.models.folder import folder_revision, model_folder

if TYPE_CHECKING:
    from vce_ray.storage.store import Store

CARD = "vce_ray.json"
"""File of an adapter folder that names the base it belongs to."""


def read_card(folder: Path) -> dict:
    """Return the card of an adapter folder. Raises UserError if the folder has none."""
    path = folder / CARD
    if not path.exists():
        raise UserError(f"{folder} is not a vce_ray adapter: {CARD} is missing")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch the adapter again") from error


def resolve_adapter(adapter: str) -> str:
    """Return `adapter` as other processes can resolve it: an absolute path, or a store URI with its endpoint."""
    if "://" not in adapter:
        return str(Path(adapter).expanduser().absolute())
    store, name = _split(adapter)
    return store.child(name).uri


def check_adapter(base: str, adapter: str) -> dict[str, Any]:
    """Return the card of an adapter after checking that it fits the base. Its weights are not read.

    Raises:
        UserError: the folder is not an adapter, or the adapter was trained on another revision of the base.
        StoreError: the adapter is not in the store.
    """
    if "://" in adapter:
        store, name = _split(adapter)
        card = store.read_json(f"{name}/{CARD}")
    else:
        card = read_card(Path(adapter))
    revision = folder_revision(model_folder(base))
    if card["base_revision"] != revision:
        raise UserError(
            f"adapter {adapter} was trained on base revision {card['base_revision']}, {base} is {revision}: "
            "serve the base it was trained on, or train an adapter for this one"
        )
    return card


def fetch_adapter(adapter: str, into: Path) -> Path:
    """Return a local folder with the adapter: the adapter itself if it is local, else a download below `into`."""
    if "://" not in adapter:
        return Path(adapter)
    store, name = _split(adapter)
    return store.fetch(name, into / "adapter")


def _split(uri: str) -> tuple[Store, str]:
    """Split an adapter's URI into its parent store and the name of its folder there."""
    from vce_ray.storage.store import Store  # pyarrow, which a local adapter does not need

    path, mark, query = uri.partition("?")
    parent, _, name = path.rstrip("/").rpartition("/")
    if parent.endswith(("/", ":")) or not name:
        raise UserError(f"{path!r} is not a folder in a store: use the form s3://bucket/run/adapter")
    return Store(parent + mark + query), name
