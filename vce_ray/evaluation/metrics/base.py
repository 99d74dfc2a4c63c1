"""The protocol of a metric: a function from the images before and after an erasure to figures.

A new metric is one module in this folder and one line in `METRICS` (`__init__.py`):

    def _measure(comparison: Comparison) -> Measured:
        before, after = comparison.keep.column("brightness")
        return Measured({"brightness_before": mean(before), "brightness_after": mean(after)})

    BRIGHTNESS = Metric(columns=("brightness",), measure=_measure)

Its figures are in metrics.json by their names and in the report's table. Metrics are pure functions of a table: they
know no model and no files, and they run in the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.schemas import BEFORE_AFTER
from vce_ray.errors import UserError
from vce_ray.evaluation.metrics.intervals import Figure

IDENTITY = ("arm", "group", "prompt", "name", "seed")
"""Columns that identify an image of the evaluation."""
GROUPS = ("erase", "keep")
"""Values of the column `group`: prompts for the concept, and prompts for what must stay."""


@dataclass(frozen=True)
class PairedRows:
    """The rows of one group before and after, in the same order: row i of both has the same prompt and seed."""

    before: list[Row]
    after: list[Row]

    def column(self, name: str) -> tuple[list[Any], list[Any]]:
        """Return the values of a column, before and after."""
        return [row[name] for row in self.before], [row[name] for row in self.after]


@dataclass(frozen=True)
class Comparison:
    """What metrics are computed from."""

    concept: Concept
    erase: PairedRows
    """Images of prompts for the concept."""
    keep: PairedRows
    """Images of prompts for what must stay. The column `name` is the neighbour, '' for a complete keep prompt."""


@dataclass(frozen=True)
class Measured:
    """What a metric returns."""

    figures: dict[str, Figure]
    """By name; in metrics.json the plain value is at the top level, the figure with its interval under `figures`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further top-level entries of metrics.json, in JSON's types."""


@dataclass(frozen=True)
class Metric:
    """A group of figures that are computed together."""

    columns: tuple[str, ...]
    """Columns of the evaluation table that `measure` reads, besides `IDENTITY`. If the table lacks one, because its
    detector does not apply to the run, the metric is skipped."""
    measure: Callable[[Comparison], Measured]


def compare(rows: Sequence[Row], concept: Concept) -> Comparison:
    """Sort the rows of an evaluation into groups, before and after.

    Raises:
        UserError: an arm or group is unknown, a group is empty, or the prompts and seeds before and after differ.
    """
    for row in rows:
        if row["arm"] not in BEFORE_AFTER or row["group"] not in GROUPS:
            raise UserError(
                f"arm {row['arm']!r}, group {row['group']!r}: arms are before and after, groups erase and keep"
            )
    for group in GROUPS:
        if not any(row["group"] == group for row in rows):
            raise UserError(f"no {group} images to evaluate: draw some before and after")
    before, after = (Counter(_identity(row) for row in rows if row["arm"] == arm) for arm in BEFORE_AFTER)
    if unpaired := (before - after) + (after - before):
        group, _, prompt, seed = min(unpaired)
        raise UserError(
            f"{sum(unpaired.values())} images are in one arm only, such as {group} {prompt!r} with seed {seed}: "
            "before and after must be drawn from the same prompts and seeds"
        )
    ordered = sorted(rows, key=_identity)
    erase, keep = (
        PairedRows(*([row for row in ordered if row["arm"] == arm and row["group"] == group] for arm in BEFORE_AFTER))
        for group in GROUPS
    )
    return Comparison(concept, erase, keep)


def _identity(row: Row) -> tuple[str, str, str, int]:
    return row["group"], row["name"] or "", row["prompt"], row["seed"]
