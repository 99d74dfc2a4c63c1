"""A user's own prompts, read from a text file or from a column of a table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.errors import UserError

MAX_PROMPT_LENGTH = 1000
MAX_PROMPTS = 100_000
COLUMN = "prompt"
"""Column of prompts in tables such as I2P's."""

Entries = Iterator[tuple[str, Any]]
"""Where an entry is in its file, such as 'line 3', and its prompt."""


def read_prompts(path: str | Path, column: str = COLUMN) -> list[str]:
    """Read prompts from a file, each once, in the order of the file. White space around a prompt is stripped.

    Args:
        path: a .csv or .tsv file with a header, a .parquet file, a .json file with a list, or a .jsonl file. Any other
            file is UTF-8 text with one prompt per line, in which lines that begin with # are comments.
        column: column or key of the prompts in tables and JSON, whose entries may also be plain strings.

    Raises:
        UserError: the file cannot be read, or contains no prompts, too many, or an invalid one: empty, too long, or
            with control characters. The message names the file and the line.
    """
    path = Path(path)
    prompts: dict[str, None] = {}
    try:
        for number, (where, value) in enumerate(READERS.get(path.suffix.lower(), _read_text)(path, column), start=1):
            if number > MAX_PROMPTS:
                raise UserError(f"{path} has more than {MAX_PROMPTS} prompts: give at most that many")
            prompts[_checked(value, f"{path}, {where}")] = None
    except OSError as error:
        raise UserError(f"cannot read the prompts file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not prompts:
        raise UserError(f"{path} contains no prompts: write one per line")
    return list(prompts)


def describe_use(prompts: list[str], concept: Concept, count: int) -> str:
    """Say how many of a user's prompts a run of `count` pairs uses, and how many of these do not name the concept."""
    used = prompts[:count]
    silent = [prompt for prompt in used if not concept.mentions(prompt)]
    text = f"{len(used)} of {len(prompts)} different prompts in the file are used, for {count} pairs"
    text += f"; {len(silent)} do not name {concept.name}, such as {silent[0][:60]!r}" if silent else ""
    return f"{text}. The evaluation draws the concept's own templates"


def _checked(value: Any, where: str) -> str:
    """Return a prompt without the white space around it. Raises UserError if it is invalid."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {str(value)[:40]!r} is not a text: write a prompt")
    prompt = value.strip()
    if not prompt:
        raise UserError(f"{where}: empty prompt: delete it or write one")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise UserError(f"{where}: {len(prompt)} characters; at most {MAX_PROMPT_LENGTH} are allowed")
    if found := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", prompt):
        raise UserError(f"{where}: control character {found.group()!r} in a prompt: remove it")
    return prompt


def _read_text(path: Path, _: str) -> Entries:
    lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        if lines != [""] and not line.startswith("#"):
            yield f"line {number}", line


def _read_delimited(delimiter: str) -> Callable[[Path, str], Entries]:
    def read(path: Path, column: str) -> Entries:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                _check_column(path, column, rows.fieldnames or [])
                for row in rows:
                    if None in row:  # DictReader's key of what has no header
                        raise UserError(f"{path}, line {rows.line_num}: too many fields: put quotes around the prompt")
                    yield f"line {rows.line_num}", row[column] or ""  # None: the row ends before the column
            except csv.Error as error:
                raise UserError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error

    return read


def _read_json(path: Path, column: str) -> Entries:
    entries = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(entries, list):
        raise UserError(f"{path} holds no list: write a list of strings, or of objects with the key {column!r}")
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", _field(path, entry, column)


def _read_json_lines(path: Path, column: str) -> Entries:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _field(path, _parse_json(line, f"{path}, line {number}"), column)


def _read_parquet(path: Path, column: str) -> Entries:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _check_column(path, column, pq.read_schema(path).names)
        values = pq.read_table(path, columns=[column])[column].to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    for number, value in enumerate(values, start=1):
        yield f"row {number}", value


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _field(path: Path, entry: Any, column: str) -> Any:
    if isinstance(entry, dict):
        _check_column(path, column, list(entry))
        return entry[column]
    return entry


def _check_column(path: Path, column: str, columns: list[str] | Any) -> None:
    if column not in columns:
        raise UserError(
            f"{path} has no column {column!r}: its columns are {', '.join(map(str, columns)) or 'none'}; name the one "
            "with the prompts with --prompt-column"
        )


READERS: dict[str, Callable[[Path, str], Entries]] = {
    ".csv": _read_delimited(","),
    ".tsv": _read_delimited("\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
"""How to read a file, by the end of its name."""
