"""Rows, and what a stage makes of them: the vocabulary of all cores. Light, so that a driver may import it."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
Outcome = tuple[list[Row], list[Row]]
"""Rows that came out well, and rejects (reject() makes them)."""
DETAIL = 500
"""Characters of an answer or an error that a reject keeps."""


def reject(row: Row, stage: str, reason: str, detail: str, attempt: int = 1) -> Row:
    """A row of `rejects/`: which row of which run failed where, why, and after how many attempts."""
    told = {"stage": stage, "reason": reason, "detail": detail[:DETAIL], "attempt": attempt}
    return {"run": row["run"], "row_id": row["key"]} | told
