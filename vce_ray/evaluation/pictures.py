"""Pictures of an evaluation: which ones are shown, how a page holds them, and the before/after sheet of a README."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vce_ray.dataflow.ids import stable_id

Row = dict[str, Any]
MAX_EDGE = 192
"""Longer edges are scaled down to this before a picture goes into a page."""


@dataclass(frozen=True)
class Shown:
    """One prompt and seed, before and after."""

    before: Row
    after: Row


def pair_up(rows: Sequence[Row], group: str) -> list[Shown]:
    """The pictures of a group ('erase' or 'keep'), before and after of the same prompt and seed side by side.

    Their order is that of a hash, so the first few are a fair draw and nobody's choice.
    """
    after = {_identity(row): row for row in rows if row["group"] == group and row["arm"] == "after"}
    before = {_identity(row): row for row in rows if row["group"] == group and row["arm"] == "before"}
    keys = sorted(before.keys() & after.keys(), key=lambda key: stable_id("show", *key))
    return [Shown(before[key], after[key]) for key in keys]


def sample(shown: Sequence[Shown], number: int) -> list[Shown]:
    """The first `number`, taking the names in turn and no prompt twice while there are others."""
    by_name: dict[str, list[Shown]] = {}
    seen: set[str] = set()
    repeated = []
    for one in shown:
        if one.before["prompt"] in seen:
            repeated.append(one)
            continue
        seen.add(one.before["prompt"])
        by_name.setdefault(one.before["name"] or "", []).append(one)
    queues = list(by_name.values())
    dealt = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return (dealt + repeated)[:number]


def data_uri(png: bytes, max_edge: int = MAX_EDGE) -> str:
    """A picture as a `data:` URI of a PNG, scaled down where it is larger than `max_edge`.

    Raises:
        ValueError: the bytes are no picture.
    """
    image = _open(png)
    if max(image.size) > max_edge:
        image.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def before_after_png(rows: Sequence[Row], path: Path, columns: int = 8) -> None:
    """Writes one PNG for a README: what prompts for the concept give, and what neighbours give, before and after.

    Args:
        rows: evaluation rows with their images, as the report takes them.
        path: where it goes; the folder must be there.
        columns: pictures in a row; the same fair draw as in the report.

    Raises:
        ValueError: there is no picture that was drawn before and after.
    """
    blocks = [
        ("Prompts that ask for the concept", sample(pair_up(rows, "erase"), columns)),
        ("Neighbours that must stay", sample(pair_up(rows, "keep"), columns)),
    ]
    blocks = [(title, shown) for title, shown in blocks if shown]
    if not blocks:
        raise ValueError("no picture was drawn both before and after: nothing to show")
    edge, gap, margin, gutter, head, foot = 144, 12, 32, 84, 44, 88
    block_height = head + 2 * edge + gap + foot
    width = 2 * margin + gutter + columns * edge + (columns - 1) * gap
    sheet = Image.new("RGB", (width, 2 * margin + len(blocks) * block_height - 32), "#ffffff")
    pen = ImageDraw.Draw(sheet)
    title_font, label_font, prompt_font = (ImageFont.load_default(size) for size in (22, 18, 13))
    for number, (title, shown) in enumerate(blocks):
        top = margin + number * block_height
        pen.text((margin, top), title, "#1c1917", title_font)
        for arm, text, colour in ((0, "before", "#a04a08"), (1, "after", "#0b6b63")):
            middle = top + head + arm * (edge + gap) + edge // 2
            pen.text((margin + gutter - 16, middle), text, colour, label_font, anchor="rm")
        for column, one in enumerate(shown):
            left = margin + gutter + column * (edge + gap)
            for arm, row in enumerate((one.before, one.after)):
                picture = _open(row["image"]).resize((edge, edge), Image.Resampling.LANCZOS)
                sheet.paste(picture, (left, top + head + arm * (edge + gap)))
            lines = wrap(one.before["prompt"], 22, max_lines=3, placeholder=" …")
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
