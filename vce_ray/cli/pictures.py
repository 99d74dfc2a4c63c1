"""Writes images to a folder without ever replacing a file. Each carries how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vce_ray.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def make_folder(folder: Path) -> None:
    """Make a folder for images. Raises UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write images to {folder}: {error.strerror}; give another folder with --out") from error


def save_new(image: Image, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Save an image under the next free number of a folder, and return its path.

    Args:
        facts: stored as text in the PNG.

    Raises:
        UserError: the folder cannot be written to.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    for path in _next_paths(folder):
        try:
            with path.open("xb") as file:  # another process may have taken the number
                image.save(file, format="PNG", pnginfo=info)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give another folder with --out") from error
        return path
    raise AssertionError("numbers do not end")


def _next_paths(folder: Path) -> Iterator[Path]:
    taken = [int(file.stem) for file in folder.glob("*.png") if re.fullmatch(r"\d{3,9}", file.stem)]
    number = max(taken, default=-1) + 1
    while True:
        yield folder / f"{number:03d}.png"
        number += 1
