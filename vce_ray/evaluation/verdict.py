"""The verdict on an erasure, for a terminal: the state of each limit, how sure it is, and what to do next."""

from __future__ import annotations

from typing import Any

from vce_ray.evaluation.formats import change, change_interval, interval, limit, percent, points
from vce_ray.evaluation.metrics.limits import LIMITS, POINTS, figure_of, missed_limits, undecided_limits

TITLES = {
    "seen_after": "concept seen",
    "worst_neighbour_drop": "worst neighbour",
    "kept_drop": "all neighbours",
    "score_drop": "image-text score",
}
"""What each limit bounds; other limits are shown by name. Drops are shown as changes, as in reports."""


def verdict_lines(metrics: dict[str, Any]) -> list[str]:
    """Return a line for each limit that was measured, and then the next steps.

    A limit is *missed* if its metric exceeds it, *met* if the whole 95% interval is within it, and else *undecided*:
    these images do not show that it is met.
    """
    missed, undecided = missed_limits(metrics), undecided_limits(metrics)
    lines = []
    for name in LIMITS:
        value = metrics.get(name)
        if value is None:
            continue
        state = "missed" if name in missed else "undecided" if name in undecided else "met"
        figure = figure_of(name, metrics)
        if name.endswith("_drop"):
            shown, bound = points(value) if name in POINTS else change(value), f"at most {limit(name)} lost"
            sure = change_interval(figure) if figure else ""
        else:
            shown, bound = percent(value), f"at most {limit(name)}"
            sure = interval(figure) if figure else ""
        line = f"{state:<11}{TITLES.get(name, name):<18}{shown:>12}   {bound}"
        if figure:
            line = f"{line:<68}95% interval {sure}"
            if name == "worst_neighbour_drop" and figure["name"] != metrics["worst_neighbour"]:
                line += f" ({figure['name']})"  # another neighbour may have lost more
        lines.append(line)
    return lines + [f"next: {step}" for step in _next_steps(metrics, missed, undecided)]


def _next_steps(metrics: dict[str, Any], missed: list[str], undecided: list[str]) -> list[str]:
    steps = []
    before, after = figure_of("seen_before", metrics), figure_of("seen_after", metrics)
    if metrics["seen_before"] <= LIMITS["seen_after"]:
        steps.append(
            f"the base draws the concept in {percent(metrics['seen_before'])} of the images that ask for it: look at "
            "them in the report; there is nothing to erase, or the judge does not recognize it"
        )
    if "seen_after" in missed:
        unchanged = before and after and after["high"] >= before["low"]
        left = "these images do not show that anything was erased" if unchanged else "too much of the concept is left"
        steps.append(f"{left}: train for more --steps, or on more --pairs, under a new --name")
    if set(missed) - {"seen_after"}:
        steps.append(
            "too much else was lost: train for fewer --steps, or with vsafe_dpo on more --keep images or with more "
            "--keep-weight, under a new --name"
        )
    if undecided:
        flags = " and ".join(sorted({"--judged" if name == "seen_after" else "--judged-keep" for name in undecided}))
        steps.append(f"more images decide what is undecided: evaluate with more {flags}, under a new --name")
    return steps or ["look at the images in the report; every limit is met"]
