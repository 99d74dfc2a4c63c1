"""Rows and what a step returns for them. Imports nothing heavy, so drivers and plain code can use it alike."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
"""A row of a stage: column name to value. Between steps it also has 'run', the name of the run it belongs to, and
'key', its value in the stage's key column."""
Outcome = tuple[list[Row], list[Row]]
"""What a step returns for a batch: the rows it produced, and the rejects, made by `reject`. Every input row leads to
exactly one row in one of the two lists, in any order."""
DETAIL = 500
"""Maximum number of characters of `detail` in a reject."""


FAULT = "fault"
"""Reason of a row at which a step failed with an exception."""
CAPTIONER_FAILED = "captioner failed"
"""Reason of a row for which a captioner gave no answer."""


def may_change(reason: str) -> bool:
    """Whether a row that was rejected for this reason may succeed when it is tried again with the same models."""
    return reason == FAULT or CAPTIONER_FAILED in reason


def reject(row: Row, stage: str, reason: str, detail: str, attempt: int = 1) -> Row:
    """Return the row of `rejects/<stage>` that records why an input row failed.

    Args:
        row: the input row, with its 'run' and 'key'.
        stage: the stage that rejected it.
        reason: a short fixed text by which rejects are counted.
        detail: what happened to this row, such as the caption or the error; cut off after DETAIL characters.
        attempt: the number of attempts made.
    """
    failure = {"stage": stage, "reason": reason, "detail": detail[:DETAIL], "attempt": attempt}
    return {"run": row["run"], "row_id": row["key"]} | failure
