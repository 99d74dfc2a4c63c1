"""What an uploaded folder and its local copy have in common. Needs no pyarrow: local adapters load without it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vce_ray.errors import UserError

FOLDER_INDEX = "_files.json"
"""Marks a completely uploaded folder: {"files": {name: digest}}."""


def file_digest(file: Path) -> str:
    """Hash a local file, as a folder index does: blake2b, 128 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def relative_path(path: str) -> str:
    """Return `path` without trailing slashes. Raises UserError if it is empty, absolute or leaves the store."""
    relative = path.rstrip("/")
    if not all(part not in ("", ".", "..") for part in relative.split("/")):
        raise UserError(
            f'{path!r} is not a valid path in a store: use one like "pairs/part.parquet", without "." or ".."'
        )
    return relative
