"""The summary of a fleet, as a page and as a terminal table: one line per concept. Made from fleet.json alone."""

from __future__ import annotations

from typing import Any

from vce_ray.evaluation.formats import points
from vce_ray.evaluation.metrics.limits import worst, worst_neighbour
from vce_ray.evaluation.page import render
from vce_ray.evaluation.times import span
from vce_ray.evaluation.verdict import limit_states, next_steps


def write_summary(fleet: dict[str, Any]) -> str:
    """Return the summary page as HTML.

    Args:
        fleet: content of fleet.json: name, seconds, asked, drawn, and runs with concept, run, fault, figures, stages.
    """
    rows = [
        row
        | {"limits": _limits(row["figures"]) if row["figures"] else {}, "total": _total_seconds(row)}
        | {"training": row["stages"].get("training", {}).get("seconds")}
        | {"worst": worst_neighbour(row["figures"]) if row["figures"] else None}
        | {"worst_asked": worst("worst_asked_drop", row["figures"]) if row["figures"] else None}
        for row in fleet["runs"]
    ]
    done = [row for row in rows if row["figures"]]
    missed = sum(bool(row["limits"]["missed"]) for row in done)
    undecided = sum(bool(row["limits"]["undecided"] and not row["limits"]["missed"]) for row in done)
    counts = {
        "all": len(rows),
        "done": len(done),
        "met": len(done) - missed - undecided,
        "undecided": undecided,
        "missed": missed,
        "failed": len(rows) - len(done),
    }
    return render("fleet.html", fleet=fleet, rows=rows, counts=counts, steps=_steps(done))


def _steps(done: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return each next step with the runs that it is for."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        for step in next_steps(row["figures"]):
            steps.setdefault(step, []).append(row)
    return list(steps.items())


def summary_table(fleet: dict[str, Any]) -> str:
    """Return the lines for a terminal: the metrics of each concept, or why its run failed."""
    width = max(len(row["concept"]) for row in fleet["runs"])
    lines = [
        f"{'':<{width}}  {'before':>7} {'after':>7} {'worst kept':>11} {'all kept':>9} {'worst asked':>12}  limits"
    ]
    for row in fleet["runs"]:
        metrics = row["figures"]
        if metrics is None:
            lines.append(f"{row['concept']:<{width}}  failed: {row['fault']}")
            continue
        shares = f"{metrics['seen_before']:7.1%} {metrics['seen_after']:7.1%}"
        changes = " ".join(
            f"{points(metrics.get(key)).removesuffix(' points'):>{size}}"
            for key, size in (("worst_neighbour_drop", 11), ("kept_drop", 9), ("worst_asked_drop", 12))
        )
        states = "; ".join(f"{state}: {', '.join(names)}" for state, names in _limits(metrics).items() if names)
        lines.append(f"{row['concept']:<{width}}  {shares} {changes}  {states or 'met'}")
    return "\n".join(lines)


def _limits(metrics: dict[str, Any]) -> dict[str, list[str]]:
    """Return the limits that a run does not meet, by state."""
    limits = limit_states(metrics)
    return {state: [limit.title for limit in limits if limit.state == state] for state in ("missed", "undecided")}


def _total_seconds(row: dict[str, Any]) -> float | None:
    """Return the time from a run's first stage to its report; it includes waiting for the other runs."""
    times = span(row["stages"].values())
    return times[1] - times[0] if times else None
