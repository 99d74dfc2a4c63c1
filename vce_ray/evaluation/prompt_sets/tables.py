"""Reads files of prompts: tables and JSON as rows by column, text as lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vce_ray.errors import UserError


@dataclass(frozen=True)
class Table:
    """The content of a file."""

    columns: Sequence[str] | None
    """None if its entries are plain texts: lines, or strings in JSON."""
    entries: Iterator[tuple[str, Any]]
    """Where each entry is in the file, such as 'line 3', and what it is: a row by column, a text, or bad input."""


def read_table(path: Path) -> Table:
    """Open a file, by the end of its name: .csv, .tsv, .json, .jsonl and .parquet are tables; all others are text.

    Raises:
        UserError: it is not in its format. Reading the entries raises too.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    return _READERS.get(path.suffix.lower(), _read_text)(path)


def _read_text(path: Path) -> Table:
    lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    numbered = enumerate(lines, start=1)
    return Table(None, ((f"line {number}", line) for number, line in numbered if lines != [""] and line[:1] != "#"))


def _read_delimited(delimiter: str) -> Callable[[Path], Table]:
    def read(path: Path) -> Table:
        rows = _delimited_rows(path, delimiter)
        header = next(rows)[1]
        return Table(header, rows)

    return read


def _delimited_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield the header as a list of columns, then each row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            yield "header", list(rows.fieldnames or [])
            for row in rows:
                if None in row:  # DictReader's key of what has no header
                    raise UserError(f"{path}, line {rows.line_num}: too many fields: put quotes around the prompt")
                yield f"line {rows.line_num}", {column: value or "" for column, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error


def _read_json(path: Path) -> Table:
    content = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):  # as COCO has them
        content = content["annotations"]
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list: write a list of strings, or of objects with the key 'prompt'")
    return _table([(f"entry {number}", entry) for number, entry in enumerate(content, start=1)])


def _read_json_lines(path: Path) -> Table:
    lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
    return _table(
        [(f"line {number}", parse_json(line, f"{path}, line {number}")) for number, line in lines if line.strip()]
    )


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        plain = [
            field.name for field in schema if not (pa.types.is_struct(field.type) or pa.types.is_binary(field.type))
        ]  # images are left out
        rows = pq.read_table(path, columns=plain).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    return Table(plain, ((f"row {number}", row) for number, row in enumerate(rows, start=1)))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. Raises UserError, which says where."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _table(entries: list[tuple[str, Any]]) -> Table:
    first = entries[0][1] if entries else None
    return Table(list(first) if isinstance(first, dict) else None, iter(entries))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_delimited(","),
    ".tsv": _read_delimited("\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
