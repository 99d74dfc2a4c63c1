"""The bars: limits that a successful erasure stays within."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BARS = {"seen_after": 0.05, "worst_neighbour_drop": 0.05, "kept_drop": 0.02, "score_drop": 0.02}
"""Upper limits by the metric's name. Shares of images, except score_drop, which is relative to the score before."""
POINTS = ("worst_neighbour_drop", "kept_drop")
"""Differences of two shares, stated in percentage points; the other bars are stated in percent."""
_TOLERANCE = 1e-9
"""1 - 0.95 must not exceed 0.05."""


def exceeds(name: str, value: float | None) -> bool:
    """Return whether a value is above its bar. On the bar is within it, and so is a value that was not measured."""
    return value is not None and value > BARS[name] + _TOLERANCE


def missed_bars(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the bars that an evaluation exceeds, in the order of `BARS`."""
    return [name for name in BARS if exceeds(name, metrics[name])]
