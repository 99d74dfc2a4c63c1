"""Errors that a user can fix. Commands print them in one line; every other exception keeps its traceback."""

from __future__ import annotations


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


def format_error(error: BaseException) -> str:
    """An error on one line: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())
