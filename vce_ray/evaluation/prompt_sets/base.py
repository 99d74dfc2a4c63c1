"""What a prompt set is: how its published files are recognized, and how a row becomes a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row of a file, by column: strings if it is CSV."""


@dataclass(frozen=True)
class SetPrompt:
    """A prompt of a set, with what its file says about it."""

    prompt: str
    """On one line, without control characters."""
    seed: int | None = None
    """Seed of the published images. It belongs to the model and the sampler of the set's authors."""
    guidance: float | None = None
    """Guidance scale of the published images."""
    categories: tuple[str, ...] = ()
    """What `category` selects by, such as 'sexual' or an artist."""


@dataclass(frozen=True)
class PromptSet:
    """A published set of prompts. Its texts are never part of this package: a user has the files."""

    name: str
    """Name that `read` and `--prompt-set` take."""
    title: str
    source: str
    """Where the files are published and what has to be done to get them, for a message: 'at https://...'."""
    columns: tuple[str, ...]
    """Columns that its files have."""
    sizes: tuple[int, ...]
    """Numbers of rows of the published files; () where they are not known, and not checked."""
    prompts: Callable[[Row], Sequence[SetPrompt]]
    """Returns the prompts of a row; none if it is not for text-to-image models."""
    header: tuple[str, ...] = ()
    """The whole header of its files, in order, by which they are recognized if others have the same columns."""

    def recognizes(self, columns: Sequence[str]) -> bool:
        """Return whether a file with these columns is taken for one of the set, if its name is not given."""
        if self.header:
            return tuple(columns) == self.header
        return bool(self.columns) and set(self.columns) <= set(columns)


def integer(row: Row, *columns: str) -> int | None:
    """Return the first of these columns that the row has as an integer; None if there is none."""
    number = real(row, *columns)
    return None if number is None else int(number)


def real(row: Row, *columns: str) -> float | None:
    """Return the first of these columns that the row has as a number; None if there is none."""
    for column in columns:
        try:
            return float(row[column])
        except (KeyError, TypeError, ValueError):
            continue
    return None


def listed(text: object) -> tuple[str, ...]:
    """Return the parts of a list that a column holds as text, such as 'shocking, sexual'."""
    return tuple(part.strip() for part in str(text or "").split(",") if part.strip())
