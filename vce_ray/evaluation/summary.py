"""The summary of a fleet, as a page and as a terminal table: one line per concept. Needs the content of fleet.json."""

from __future__ import annotations

from typing import Any

from vce_ray.evaluation.formats import points
from vce_ray.evaluation.metrics.bars import missed_bars
from vce_ray.evaluation.page import render


def write_summary(fleet: dict[str, Any]) -> str:
    """Return the summary page as HTML.

    Args:
        fleet: content of fleet.json: name, seconds, asked, drawn, and runs with concept, run, fault, figures, stages.
    """
    rows = [
        row | {"missed": missed_bars(row["figures"]) if row["figures"] else [], "seconds": _training_seconds(row)}
        for row in fleet["runs"]
    ]
    done = [row for row in rows if row["figures"]]
    counts = {
        "all": len(rows),
        "done": len(done),
        "met": sum(not row["missed"] for row in done),
        "failed": sum(bool(row["fault"]) for row in rows),
    }
    return render("fleet.html", fleet=fleet, rows=rows, counts=counts)


def summary_table(fleet: dict[str, Any]) -> str:
    """Return the lines for a terminal: the metrics of each concept, or why its run failed."""
    width = max(len(row["concept"]) for row in fleet["runs"])
    lines = [f"{'':<{width}}  {'before':>7} {'after':>7} {'worst kept':>11} {'all kept':>9}  bars"]
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
        missed = ", ".join(missed_bars(metrics))
        lines.append(f"{row['concept']:<{width}}  {shares} {changes}  {f'missed: {missed}' if missed else 'met'}")
    return "\n".join(lines)


def _training_seconds(row: dict[str, Any]) -> float | None:
    """Return how long the run trained: the part of its time that it shares with no other run."""
    return row["stages"].get("training", {}).get("seconds")
