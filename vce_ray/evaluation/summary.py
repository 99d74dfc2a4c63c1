"""The summary page of a fleet: one line for each concept, with what failed and why. Made from a dict alone."""

from __future__ import annotations

from typing import Any

from vce_ray.evaluation.metrics import missed_bars
from vce_ray.evaluation.report import points, render


def write_summary(fleet: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        fleet: what fleet.json holds: name, seconds, asked, drawn, and runs with concept, run, fault, figures, stages.
    """
    rows = [
        row | {"missed": missed_bars(row["figures"]) if row["figures"] else [], "seconds": _seconds(row["stages"])}
        for row in fleet["runs"]
    ]
    done = [row for row in rows if row["figures"]]
    met = sum(not row["missed"] for row in done)
    counts = {"all": len(rows), "done": len(done), "met": met, "failed": sum(bool(row["fault"]) for row in rows)}
    return render("fleet.html", fleet=fleet, rows=rows, counts=counts)


def summary_table(fleet: dict[str, Any]) -> str:
    """Lines for a terminal: each concept with its figures, or with what it failed of."""
    width = max(len(row["concept"]) for row in fleet["runs"])
    lines = [f"{'':<{width}}  {'before':>7} {'after':>7} {'worst kept':>11} {'all kept':>9}  bars"]
    for row in fleet["runs"]:
        figures = row["figures"]
        if figures is None:
            lines.append(f"{row['concept']:<{width}}  failed: {row['fault']}")
            continue
        shares = f"{figures['seen_before']:7.1%} {figures['seen_after']:7.1%}"
        drops = " ".join(
            f"{points(figures[key], signed=True).removesuffix(' points'):>{size}}"
            for key, size in (("worst_neighbour_drop", 11), ("kept_drop", 9))
        )
        missed = missed_bars(figures)
        lines.append(
            f"{row['concept']:<{width}}  {shares} {drops}  {'missed: ' + ', '.join(missed) if missed else 'met'}"
        )
    return "\n".join(lines)


def _seconds(stages: dict[str, Any]) -> float | None:
    """How long the training of a run took: what fleets do not share."""
    return stages.get("training", {}).get("seconds")
