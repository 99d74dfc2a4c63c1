"""Locates, checks and downloads the adapter that an endpoint serves: a local folder, or one in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vce_ray.errors import UserError
from vce_ray.models.adapter import CARD, read_card
from vce_ray.models.folder import folder_revision, model_folder
from vce_ray.storage.store import Store


def resolve_base(base: str) -> str:
    """Return `base` in a form that replicas can resolve: relative folders become absolute.

    Raises:
        UserError: the base is unknown or has no weights.
    """
    folder = model_folder(base)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"base model {base!r} has no weights in {folder}: give a folder with *.safetensors")
    return str(folder.absolute()) if Path(base).is_dir() else base


def resolve_adapter(adapter: str) -> str:
    """Return `adapter` in a form that replicas can resolve: an absolute path, or a store URI with its endpoint."""
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
    path, mark, query = uri.partition("?")
    parent, _, name = path.rstrip("/").rpartition("/")
    if parent.endswith(("/", ":")) or not name:
        raise UserError(f"{path!r} is not a folder in a store: use the form s3://bucket/run/adapter")
    return Store(parent + mark + query), name
