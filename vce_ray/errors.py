"""Errors that a user can fix. Commands print them in one line; every other exception keeps its traceback."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_QUOTED = 200
"""Characters of a value that a message repeats. The value comes from a user's file, so it may be of any size."""
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, MAX_QUOTED, MAX_QUOTED


class UserError(ValueError):
    """Bad input or a bad environment. The message names the value, the limit and the fix.

    Args:
        found: what is wrong, or the whole message.
        fix: what to do about it, unless `found` says so already.
    """

    def __init__(self, found: str, fix: str = ""):
        super().__init__(f"{found}: {fix}" if fix else found)
        self.found, self.fix = found, fix


class CaptionerError(UserError):
    """A captioner or refiner is unusable (bad address or token, no answer in time), so no row is to blame."""


@contextmanager
def file_problems(fix: str, path: Path | None = None) -> Iterator[None]:
    """Raise what the operating system refuses (no permission, disk full, a file in place of a folder) as UserError.

    Args:
        fix: what to do.
        path: the path to name in the message; by default the one that the error names.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise UserError(f"cannot write {path or error.filename} ({os.strerror(error.errno)}): {fix}") from error


def format_error(error: BaseException) -> str:
    """An error on one line: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def quote(value: Any) -> str:
    """Return the repr of a value for a message: at most MAX_QUOTED characters, whatever the size of the value."""
    return _first(_REPR.repr(value))


def cut(text: str) -> str:
    """Return a text for a message: in one line, of at most MAX_QUOTED characters."""
    return _first(" ".join(text.split()))


def _first(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."
