"""Errors that a user can fix. Commands print them in one line; every other exception keeps its traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Bad input or a bad environment. The message names the value, the limit and the fix."""


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
