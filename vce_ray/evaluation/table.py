"""Tables of metrics: the one that a command prints after an erasure, and the README's table of several erasures."""

from __future__ import annotations

from typing import Any

from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.formats import percent, points
from vce_ray.evaluation.metrics.limits import worst_neighbour

ROWS = (
    ("concept seen", "seen_before", "seen_after"),
    ("  in held-out templates", "held_out_before", "held_out_after"),
    ("neighbours recognized", "kept_before", "kept_after"),
    ("image-text score, kept", "score_before", "score_after"),
    ("no clear object", "unclear_before", "unclear_after"),
    ("score without the concept", "refined_score_before", "refined_score_after"),
)
"""Title, metric before and metric after."""


def before_after_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return title, metric before and metric after of what was measured, also of what else the prompts asked for."""
    slots = sorted(slot["name"] for slot in metrics.get("asked", ()))
    asked = [(f"asked {slot} drawn", f"asked_{slot}_before", f"asked_{slot}_after") for slot in slots]
    return [row for row in (*ROWS, *asked) if all(metrics.get(name) is not None for name in row[1:])]


def before_after_table(metrics: dict[str, Any]) -> str:
    """Return metrics before and after as lines for a terminal; those that were not measured are left out."""
    lines = [f"{'':<26}{'before':>9}{'after':>9}"]
    for title, before, after in before_after_rows(metrics):
        number = "{:9.3f}" if "score" in before else "{:9.1%}"
        lines.append(f"{title:<26}{number.format(metrics[before])}{number.format(metrics[after])}")
    if len(judges := metrics.get("judges", ())) > 1:  # of one alone, its figures are those above
        lines.append("seen by")
        for judge in judges:
            shares = (percent(judge[arm]["value"]) for arm in ("before", "after"))
            lines.append(f"{'':<26}{'{:>9}{:>9}'.format(*shares)}  {judge['judge']}, if it {judge['rule']}")
    if worst := worst_neighbour(metrics):
        lines.append(f"worst neighbour: {worst}, {points(metrics['worst_neighbour_drop'])}")
    if metrics.get("something_share") is not None:
        lines.append(f"images after that show some object: {metrics['something_share']:.1%}")
    return "\n".join(lines)


def evaluation_row(metrics: dict[str, Any], concept: str, method: str, seed: int, command: str) -> Row:
    """Return one row for `results_table`: the main metrics as plain numbers, and the command that reproduces them."""
    names = ["seen_before", "seen_after", "worst_neighbour_drop", "kept_drop", "score_drop"]
    slots = sorted(slot["name"] for slot in metrics.get("asked", ()))
    names += [f"asked_{slot}_{side}" for slot in slots for side in ("before", "after", "drop")]
    more = ("unclear_before", "unclear_after", "kid_before", "kid_after", "kid_floor", "refined_score_drop")
    names += [name for name in more if metrics.get(name) is not None]
    return {
        "concept": concept,
        "method": method,
        "images": metrics["figures"]["seen_after"]["images"],
        **{name: metrics[name] for name in names},
        "seed": seed,
        "command": command,
    }


def results_table(rows: list[Row]) -> str:
    """Return rows of `evaluation_row` as a Markdown table, with shares in percent and drops as signed changes."""
    lines = [
        "| concept | method | images | seen before | seen after | worst neighbour | all kept | image-text score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("worst_neighbour_drop", "kept_drop", "score_drop")
        neighbour, kept, score = (f"{round(-100 * row[name], 1) + 0.0:+.1f}" for name in names)  # + 0.0: no -0.0
        lines.append(
            f"| {row['concept']} | {row['method']} | {row['images']} | {row['seen_before']:.1%} | "
            f"{row['seen_after']:.1%} | {neighbour} | {kept} | {score}% |"
        )
    return "\n".join(lines)
