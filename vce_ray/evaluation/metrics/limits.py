"""The limits that a successful erasure stays within."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIMITS = {
    "seen_after": 0.05,
    "worst_neighbour_drop": 0.05,
    "kept_drop": 0.02,
    "score_drop": 0.02,
    "worst_asked_drop": 0.05,
    "unclear_after": 0.10,
}
"""Upper limits by the metric's name. Shares of images, except score_drop, which is relative to the score before."""
POINTS = ("worst_neighbour_drop", "kept_drop", "worst_asked_drop")
"""Differences of two shares, stated in percentage points; the other limits are stated in percent."""
WORST = {"worst_neighbour_drop": "neighbours", "worst_asked_drop": "asked"}
"""Limits that bound the drop of each row of a list, by the list's name in metrics.json."""
OF_ERASE_PROMPTS = ("seen_after", "worst_asked_drop", "unclear_after")
"""Limits of images whose prompts ask for the concept; the others are of images that must stay."""
BASE_WITHIN = {"unclear_after": "unclear_before"}
"""Limits that hold only if the base keeps to them: a judge that is unsure of the base's own images says nothing."""
_TOLERANCE = 1e-9
"""1 - 0.95 must not exceed 0.05."""


def applies(name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a limit was measured, and says something with this base and judge."""
    base = metrics.get(BASE_WITHIN[name]) if name in BASE_WITHIN else None
    return metrics.get(name) is not None and not exceeds(name, base)


def exceeds(name: str, value: float | None) -> bool:
    """Return whether a value is above its limit. A value equal to the limit passes, and so does None (not measured)."""
    return value is not None and value > LIMITS[name] + _TOLERANCE


def missed_limits(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the limits that an evaluation shows to be exceeded, in the order of `LIMITS`.

    The whole 95% interval is beyond them; for the worst of several rows, that of any row. A metric without an interval
    counts by its value. Metrics that are missing, because a run skipped them or was evaluated before they existed,
    exceed no limit.
    """
    return [name for name in LIMITS if applies(name, metrics) and exceeds(name, _low(name, metrics))]


def undecided_limits(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the limits that lie within the 95% interval of an evaluation, in the order of `LIMITS`.

    More images would show whether they are exceeded. For the worst of several rows the intervals of all rows count.
    """
    missed = missed_limits(metrics)
    return [
        name
        for name in LIMITS
        if name not in missed
        and applies(name, metrics)
        and (figure := figure_of(name, metrics))
        and exceeds(name, figure["high"])
    ]


def _low(name: str, metrics: Mapping[str, Any]) -> float | None:
    """Return the lower end of a metric's interval, or its value if it has no interval."""
    if name in WORST and metrics.get(WORST[name]):
        lows = [row["drop"]["low"] for row in metrics[WORST[name]] if row["drop"]["low"] is not None]
        return max(lows, default=None)
    figure = figure_of(name, metrics)
    return figure["low"] if figure else metrics.get(name)


def figure_of(name: str, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the figure behind a metric: value, low, high, images. None if it was not measured with an interval.

    For the worst of several rows, such as neighbours, it is the one that reaches highest, with its `name`.
    """
    if name in WORST:
        rows = metrics.get(WORST[name], ())
        figures = [row["drop"] | {"name": row["name"]} for row in rows if row["drop"]["value"] is not None]
        return max(figures, key=lambda figure: figure["high"], default=None)
    figure = metrics.get("figures", {}).get(name)
    return figure if figure and figure["value"] is not None else None


def worst_neighbour(metrics: Mapping[str, Any]) -> str | None:
    """Return the neighbour that lost most; of several that lost as much, the one whose interval reaches highest."""
    return worst("worst_neighbour_drop", metrics)


def worst(name: str, metrics: Mapping[str, Any]) -> str | None:
    """Return the row that a limit of `WORST` names, such as a neighbour; None if there is none.

    Of several that lost as much it is the one whose interval reaches highest.
    """
    figure = figure_of(name, metrics)
    if figure and figure["value"] == metrics.get(name):
        return figure["name"]
    return metrics.get(name.removesuffix("_drop"))
