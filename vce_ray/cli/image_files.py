"""Writes images to a folder without ever replacing a file. Each carries how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vce_ray.errors import file_problems

if TYPE_CHECKING:
    from PIL.Image import Image


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
    with file_problems("set --out to another folder", folder):
        for path in _next_paths(folder):
            try:
                file = path.open("xb")
            except FileExistsError:  # another process has taken the number
                continue
            with file:
                image.save(file, format="PNG", pnginfo=info)
            return path
    raise AssertionError("numbers do not end")


def _next_paths(folder: Path) -> Iterator[Path]:
    taken = [int(file.stem) for file in folder.glob("*.png") if re.fullmatch(r"\d{3,9}", file.stem)]
    number = max(taken, default=-1) + 1
    while True:
        yield folder / f"{number:03d}.png"
        number += 1
