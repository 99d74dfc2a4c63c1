"""Prompt sets that papers use, read from the files that a user has. None of their texts is in this package.

    read("i2p_benchmark.csv")                                        recognized by its columns
    read("i2p_benchmark.csv", "i2p", "sexual")                       checked to be the published file
    read("i2p_benchmark.csv", category="nudity_percentage>=50")
    read("unlearn-canvas", category="Van Gogh")                      made here, there is no file

One set per file; `PROMPT_SETS` lists them. Nothing here imports torch or asks a network.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vce_ray.errors import UserError, cut, quote
from vce_ray.evaluation.prompt_sets.base import PromptSet, Row, SetPrompt
from vce_ray.evaluation.prompt_sets.coco import COCO, COCO_ANNOTATIONS
from vce_ray.evaluation.prompt_sets.ecgvf import ECGVF
from vce_ray.evaluation.prompt_sets.i2p import I2P
from vce_ray.evaluation.prompt_sets.mace import MACE
from vce_ray.evaluation.prompt_sets.mma_diffusion import MMA_DIFFUSION
from vce_ray.evaluation.prompt_sets.ring_a_bell import RING_A_BELL
from vce_ray.evaluation.prompt_sets.six_cd import SIX_CD
from vce_ray.evaluation.prompt_sets.tables import Table, read_table
from vce_ray.evaluation.prompt_sets.unisafe import UNISAFE
from vce_ray.evaluation.prompt_sets.unlearn_canvas import UNLEARN_CANVAS, unlearn_canvas_prompts
from vce_ray.evaluation.prompt_sets.unlearn_diff_atk import UNLEARN_DIFF_ATK

__all__ = ["PROMPT_SETS", "PromptSet", "SetPrompt", "find_set", "read", "read_set"]

PROMPT_SETS: tuple[PromptSet, ...] = (
    I2P,
    UNISAFE,
    ECGVF,
    MMA_DIFFUSION,
    MACE,
    COCO,
    COCO_ANNOTATIONS,
    SIX_CD,
    RING_A_BELL,
    UNLEARN_DIFF_ATK,
    UNLEARN_CANVAS,
)
"""All sets. A file is taken for the first that recognizes its columns, so those with most of their own come first."""
_AT_LEAST = re.compile(r"\s*(\w+)\s*>=\s*(\d+(?:\.\d+)?)\s*")
_BLANK = re.compile(r"[\x00-\x20\x7f-\xa0\ud800-\udfff]+")
"""White space and control characters, some of which are in the published files."""


def read(path: str | Path, name: str | None = None, category: str | None = None) -> list[SetPrompt]:
    """Read the prompts of a set, in the order of the file; the same text may occur with several seeds.

    Args:
        path: a .csv, .tsv, .json, .jsonl or .parquet file, or the name of a set that has no file.
        name: the set that the file is of, which must have that set's columns and size. Default: the set is found by
            its columns, and the file may be a part of it.
        category: reads prompts of this category alone, or those with a number of at least so much in a column, such as
            'nudity_percentage>=50'.

    Raises:
        UserError: the file cannot be read, is not of the set, or of none, or has no such category; or there is no file,
            in which case the message says where the set is published.
    """
    return read_set(path, name, category)[1]


def read_set(
    path: str | Path, name: str | None = None, category: str | None = None
) -> tuple[PromptSet, list[SetPrompt]]:
    """Read as `read` does, and return the set that the file is of too. Raises like it."""
    chosen, table = _open(path, name)
    if table is None:
        prompts = [({}, prompt) for prompt in unlearn_canvas_prompts()]
    else:
        rows = list(_rows(path, chosen, table))
        if name is not None and chosen.sizes and len(rows) not in chosen.sizes:
            sizes = " or ".join(f"{size:,}" for size in chosen.sizes)
            raise UserError(
                f"{path} has {len(rows):,} rows; the published files of {chosen.title} have {sizes}",
                "give a whole file, or leave out the name of the set",
            )
        prompts = [(row, _clean(prompt, f"{path}, {where}")) for where, row in rows for prompt in chosen.prompts(row)]
    selected = _of_category(prompts, category, str(path)) if category else [prompt for _, prompt in prompts]
    if not selected:
        raise UserError(f"{path} has no prompts for text-to-image models: give another file of {chosen.title}")
    return chosen, selected


def find_set(path: str | Path) -> PromptSet | None:
    """Return the set that a file is recognized as, or that has this name and no file; None if there is none.

    Raises:
        UserError: the file is not in its format.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    if str(path) == UNLEARN_CANVAS.name:
        return UNLEARN_CANVAS
    return _recognized(read_table(Path(path)))


def _recognized(table: Table) -> PromptSet | None:
    return next((each for each in PROMPT_SETS if each.recognizes(table.columns or ())), None)


def _open(path: str | Path, name: str | None) -> tuple[PromptSet, Table | None]:
    """Return the set and its file; no file for a set that is made here."""
    by_name = {each.name: each for each in PROMPT_SETS}
    if name is not None and name not in by_name:
        raise UserError(f"unknown prompt set {quote(name)}", f"give one of {', '.join(by_name)}")
    wanted = by_name.get(name or str(path))
    if wanted is UNLEARN_CANVAS:
        return UNLEARN_CANVAS, None
    try:
        table = read_table(Path(path))
    except OSError as error:
        published = f"{wanted.title} is published {wanted.source}, and give its path" if wanted else ""
        raise UserError(f"cannot read the prompts file {path}: {error.strerror or error}", published) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if wanted is not None:
        if missing := [column for column in wanted.columns if column not in (table.columns or ())]:
            raise UserError(
                f"{path} is no file of {wanted.title}: it has no column {missing[0]!r} among {_columns(table)}",
                f"{wanted.title} is published {wanted.source}",
            )
        return wanted, table
    found = _recognized(table)
    if found is None:
        raise UserError(
            f"{path} is of no known prompt set: its columns are {_columns(table)}",
            f"known are {', '.join(by_name)}",
        )
    return found, table


def _columns(table: Table) -> str:
    return cut(", ".join(column for column in table.columns or () if column)) or "none"


def _rows(path: str | Path, chosen: PromptSet, table: Table) -> Iterator[tuple[str, Row]]:
    for where, row in table.entries:
        if not isinstance(row, dict):
            raise UserError(f"{path}, {where}: {quote(row)} is not a row of {chosen.title}")
        if missing := [column for column in chosen.columns if column not in row]:
            raise UserError(f"{path}, {where}: a row of {chosen.title} without {missing[0]!r}")
        yield where, row


def _clean(prompt: SetPrompt, where: str) -> SetPrompt:
    """Return a prompt on one line. Raises UserError if it is no text or empty."""
    text: Any = prompt.prompt
    if not isinstance(text, str) or not (line := _BLANK.sub(" ", text).strip()):
        raise UserError(f"{where}: {str(text)[:40]!r} is no prompt: write one, or delete the row")
    return SetPrompt(line, prompt.seed, prompt.guidance, prompt.categories)


def _of_category(prompts: Sequence[tuple[Row, SetPrompt]], category: str, path: str) -> list[SetPrompt]:
    """Return the prompts of a category, or with so much in a column. Raises UserError if there are none."""
    if found := _AT_LEAST.fullmatch(category):
        column, least = found.group(1), float(found.group(2))
        if prompts and column not in prompts[0][0]:
            columns = ", ".join(column for column in prompts[0][0] if column)
            raise UserError(f"category {category!r}: {path} has no column {column!r} among {cut(columns) or 'none'}")
        selected = [prompt for row, prompt in prompts if _number(row[column], category, path) >= least]
        if not selected:
            raise UserError(f"category {category!r}: no prompt of {path} has that much")
        return selected
    wanted = _plain(category)
    selected = [prompt for _, prompt in prompts if wanted in map(_plain, prompt.categories)]
    if not selected:
        counts = Counter(name for _, prompt in prompts for name in prompt.categories)
        known = ", ".join(f"{name} ({count})" for name, count in counts.most_common(12))
        raise UserError(f"category {category!r}: {path} has {cut(known) or 'no categories'}")
    return selected


def _number(value: Any, category: str, path: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"category {category!r}: {quote(value)} in {path} is no number") from None


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
