"""Did the neighbours stay: shares of their images that the classifier labels correctly.

kept_before, kept_after, kept_drop: over the images of all neighbours.
worst_neighbour, worst_neighbour_drop: the neighbour that lost most, and how much; None without neighbours.
neighbours: {name, before, after, drop} of each, with its figures, largest drop first.
"""

from __future__ import annotations

from dataclasses import asdict

from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric, PairedRows
from vce_ray.evaluation.metrics.intervals import drop, share


def _measure(comparison: Comparison) -> Measured:
    keep = comparison.keep
    before, after = (
        share(row["label"] == row["name"] for row in rows if row["name"]) for rows in (keep.before, keep.after)
    )
    neighbours = _neighbours(keep)
    worst = neighbours[0] if neighbours else None
    return Measured(
        {"kept_before": before, "kept_after": after, "kept_drop": drop(before, after)},
        {
            "worst_neighbour": worst["name"] if worst else None,
            "worst_neighbour_drop": worst["drop"]["value"] if worst else None,
            "neighbours": neighbours,
        },
    )


def _neighbours(keep: PairedRows) -> list[Row]:
    found = []
    for name in dict.fromkeys(row["name"] for row in keep.before if row["name"]):
        before, after = (
            share(row["label"] == name for row in rows if row["name"] == name) for rows in (keep.before, keep.after)
        )
        change = drop(before, after)
        found.append({"name": name, "before": asdict(before), "after": asdict(after), "drop": asdict(change)})
    return sorted(found, key=lambda row: (-row["drop"]["value"], row["name"]))


KEPT = Metric(columns=("label",), measure=_measure)
