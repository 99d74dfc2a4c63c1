"""Warnings of this package, marked so that they can be told from everything else that processes of a cluster print."""

from __future__ import annotations

import logging
import re
import sys

MARK = "vce_ray warning: "
_MARKED = re.compile(rf"{MARK}(.*?)(?:\x1b\[|\s+\[repeated |$)")


class _Marked(logging.Handler):
    """Writes to whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{MARK}{self.format(record)}", file=sys.stderr, flush=True)


def mark_warnings() -> None:
    """Give the warnings of this process MARK. Workers and drivers call it when they start."""
    logger = logging.getLogger("vce_ray")
    if not any(isinstance(handler, _Marked) for handler in logger.handlers):
        logger.addHandler(_Marked(logging.WARNING))
        logger.propagate = False


def find_warning(line: str) -> str | None:
    """Return the warning in a line of a log, without what Ray adds to it, or None."""
    found = _MARKED.search(line)
    return found[1].strip() if found else None
