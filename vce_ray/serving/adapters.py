"""Finds the adapter that an endpoint shall serve: a local folder, or what a run has uploaded to its store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vce_ray.errors import UserError
from vce_ray.models.adapter import CARD, read_card
from vce_ray.models.load import folder_revision, model_folder
from vce_ray.storage.store import Store


def resolve_base(base: str) -> str:
    """`base` as replicas can find it: a relative folder becomes an absolute one. Raises UserError if it is unknown."""
    folder = model_folder(base)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"base model {base!r} has no weights in {folder}: give a folder with *.safetensors")
    return str(folder.absolute()) if Path(base).is_dir() else base


def resolve_adapter(adapter: str) -> str:
    """`adapter` as replicas can find it: an absolute path, or a store URI with its endpoint written out."""
    if "://" not in adapter:
        return str(Path(adapter).expanduser().absolute())
    store, name = _split(adapter)
    return store.child(name).uri


def check_adapter(base: str, adapter: str) -> dict[str, Any]:
    """The card of an adapter that fits this base; its weights are not read.

    Raises:
        UserError: it is no adapter, or was trained on another revision of the base; both are named.
        StoreError: the store does not have it.
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
            "serve the base it was trained on, or erase again from this one"
        )
    return card


def fetch_adapter(adapter: str, into: Path) -> Path:
    """A local folder with the adapter: its own where it is local, else a copy below `into`."""
    if "://" not in adapter:
        return Path(adapter)
    store, name = _split(adapter)
    return store.fetch(name, into / "adapter")


def _split(uri: str) -> tuple[Store, str]:
    """The store that holds an adapter, and the adapter's folder in it."""
    path, mark, query = uri.partition("?")
    parent, _, name = path.rstrip("/").rpartition("/")
    if parent.endswith(("/", ":")) or not name:
        raise UserError(f"{path!r} names no folder in a store: give s3://bucket/run/adapter")
    return Store(parent + mark + query), name
