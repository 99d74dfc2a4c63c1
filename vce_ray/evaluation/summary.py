"""The summary of a fleet, as a page and as a terminal table: one line per concept. Made from fleet.json alone."""

from __future__ import annotations

from typing import Any

from vce_ray.evaluation.formats import points
from vce_ray.evaluation.metrics.limits import missed_limits, undecided_limits
from vce_ray.evaluation.page import render


def write_summary(fleet: dict[str, Any]) -> str:
    """Return the summary page as HTML.

    Args:
        fleet: content of fleet.json: name, seconds, asked, drawn, and runs with concept, run, fault, figures, stages.
    """
    rows = [
        row | {"limits": _limits(row["figures"]) if row["figures"] else {}, "seconds": _training_seconds(row)}
        for row in fleet["runs"]
    ]
    done = [row for row in rows if row["figures"]]
    counts = {
        "all": len(rows),
        "done": len(done),
        "met": sum(not any(row["limits"].values()) for row in done),
        "failed": sum(bool(row["fault"]) for row in rows),
    }
    return render("fleet.html", fleet=fleet, rows=rows, counts=counts)


def summary_table(fleet: dict[str, Any]) -> str:
    """Return the lines for a terminal: the metrics of each concept, or why its run failed."""
    width = max(len(row["concept"]) for row in fleet["runs"])
    lines = [f"{'':<{width}}  {'before':>7} {'after':>7} {'worst kept':>11} {'all kept':>9}  limits"]
    for row in fleet["runs"]:
        metrics = row["figures"]
        if metrics is None:
            lines.append(f"{row['concept']:<{width}}  failed: {row['fault']}")
            continue
        shares = f"{metrics['seen_before']:7.1%} {metrics['seen_after']:7.1%}"
        changes = " ".join(
            f"{points(metrics[key]).removesuffix(' points'):>{size}}"
            for key, size in (("worst_neighbour_drop", 11), ("kept_drop", 9))
        )
        states = "; ".join(f"{state}: {', '.join(names)}" for state, names in _limits(metrics).items() if names)
        lines.append(f"{row['concept']:<{width}}  {shares} {changes}  {states or 'met'}")
    return "\n".join(lines)


def _limits(metrics: dict[str, Any]) -> dict[str, list[str]]:
    """Return the limits that a run does not meet, by state."""
    return {"missed": missed_limits(metrics), "undecided": undecided_limits(metrics)}


def _training_seconds(row: dict[str, Any]) -> float | None:
    """Return how long the run trained: the only part of its time that other runs do not share."""
    return row["stages"].get("training", {}).get("seconds")
