"""Images of an evaluation: which ones to show, data URIs for a page, and the before/after sheet of the README."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import IO

from PIL import Image, ImageDraw, ImageFont

from vce_ray.dataflow.ids import stable_id
from vce_ray.dataflow.rows import Row

MAX_EDGE = 192
"""Pixels; larger images are scaled down before they are embedded in a page."""


@dataclass(frozen=True)
class ImagePair:
    """The evaluation rows of one prompt and seed, before and after."""

    before: Row
    after: Row


def pair_images(rows: Sequence[Row], group: str) -> list[ImagePair]:
    """Pair the rows of a group ('erase' or 'keep') before and after by prompt and seed.

    They are ordered by a hash, so the first few are a random sample and not hand-picked.
    """
    after = {_identity(row): row for row in rows if row["group"] == group and row["arm"] == "after"}
    before = {_identity(row): row for row in rows if row["group"] == group and row["arm"] == "before"}
    keys = sorted(before.keys() & after.keys(), key=lambda key: stable_id("show", *key))
    return [ImagePair(before[key], after[key]) for key in keys]


def sample(pairs: Sequence[ImagePair], number: int) -> list[ImagePair]:
    """Return the first `number` pairs, taking turns among the names, and repeating a prompt only when none is left."""
    by_name: dict[str, list[ImagePair]] = {}
    prompts: set[str] = set()
    repeated = []
    for pair in pairs:
        if pair.before["prompt"] in prompts:
            repeated.append(pair)
            continue
        prompts.add(pair.before["prompt"])
        by_name.setdefault(pair.before["name"] or "", []).append(pair)
    queues = list(by_name.values())
    turns = range(max(map(len, queues), default=0))
    return ([queue[turn] for turn in turns for queue in queues if turn < len(queue)] + repeated)[:number]


def data_uri(png: bytes, max_edge: int = MAX_EDGE) -> str:
    """Return an image as a `data:` URI of a PNG, scaled down if an edge is longer than `max_edge`.

    Raises:
        ValueError: the bytes are not an image.
    """
    image = _open(png)
    if max(image.size) > max_edge:
        image.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def before_after_png(rows: Sequence[Row], path: Path | IO[bytes], columns: int = 8) -> None:
    """Write one PNG with images of prompts for the concept and of its neighbours, before and after.

    Args:
        rows: the evaluation table, with images, before and after.
        path: file to write, whose folder must exist, or an open one.
        columns: images in a row, sampled as in the report.

    Raises:
        ValueError: no image was drawn both before and after.
    """
    blocks = [
        ("Prompts that ask for the concept", sample(pair_images(rows, "erase"), columns)),
        ("Neighbours that must stay", sample(pair_images(rows, "keep"), columns)),
    ]
    blocks = [(title, pairs) for title, pairs in blocks if pairs]
    if not blocks:
        raise ValueError("no image was drawn both before and after: nothing to show")
    edge, gap, margin, gutter, head, foot = 144, 12, 32, 84, 44, 88
    block_height = head + 2 * edge + gap + foot
    width = 2 * margin + gutter + columns * edge + (columns - 1) * gap
    sheet = Image.new("RGB", (width, 2 * margin + len(blocks) * block_height - 32), "#ffffff")
    pen = ImageDraw.Draw(sheet)
    title_font, label_font, prompt_font = (ImageFont.load_default(size) for size in (22, 18, 13))
    for number, (title, pairs) in enumerate(blocks):
        top = margin + number * block_height
        pen.text((margin, top), title, "#1c1917", title_font)
        for arm, text, colour in ((0, "before", "#a04a08"), (1, "after", "#0b6b63")):
            middle = top + head + arm * (edge + gap) + edge // 2
            pen.text((margin + gutter - 16, middle), text, colour, label_font, anchor="rm")
        for column, pair in enumerate(pairs):
            left = margin + gutter + column * (edge + gap)
            for arm, row in enumerate((pair.before, pair.after)):
                image = _open(row["image"]).resize((edge, edge), Image.Resampling.LANCZOS)
                sheet.paste(image, (left, top + head + arm * (edge + gap)))
            lines = wrap(pair.before["prompt"], 22, max_lines=3, placeholder=" …")
            pen.multiline_text(
                (left, top + head + 2 * edge + gap + 8), "\n".join(lines), "#57534e", prompt_font, spacing=3
            )
    sheet.save(path, format="PNG", optimize=True)


def _open(png: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(png)).convert("RGB")
    except OSError as error:
        raise ValueError(f"an image of {len(png)} bytes cannot be read: {error}") from error


def _identity(row: Row) -> tuple[str, str, int]:
    return row["name"] or "", row["prompt"], row["seed"]
