"""Numbers as pages and terminal tables show them, with true minus signs and without '-0.0'."""

from __future__ import annotations

from math import isfinite
from typing import Any

from vce_ray.evaluation.metrics.limits import LIMITS, POINTS

MINUS = "\u2212"
"""A true minus sign, as wide as the plus."""
NO_VALUE = "\u2013"
"""Shown for a metric that was not measured."""


def percent(value: float | None, digits: int = 1) -> str:
    """Format 0.0123 as '1.2%'."""
    return NO_VALUE if value is None else f"{_rounded(100 * value, digits)}%".replace("-", MINUS)


def points(drop: float | None, signed: bool = True) -> str:
    """Format a drop of 0.012 as '-1.2 points' and a rise as '+1.2 points'; unsigned, the drop as '1.2 points'."""
    if drop is None:
        return NO_VALUE
    text = _rounded(-100 * drop if signed else 100 * drop, 1)
    return f"{'+' if signed and float(text) > 0 else ''}{text} points".replace("-", MINUS)


def change(drop: float | None) -> str:
    """Format a relative drop of 0.012 as '-1.2%' and a rise as '+1.2%'."""
    return points(drop).replace(" points", "%")


def interval(figure: dict[str, Any], scale: float = 100, digits: int = 1) -> str:
    """Format the interval of a figure as '0.5 to 2.7', in percent; with scale 1, in the figure's own unit."""
    if figure["value"] is None:
        return NO_VALUE
    return " to ".join(_rounded(scale * figure[end], digits) for end in ("low", "high")).replace("-", MINUS)


def change_interval(figure: dict[str, Any]) -> str:
    """Format the interval of a drop as the interval of the change: '-2.7 to +0.5'."""
    if figure["value"] is None:
        return NO_VALUE
    return " to ".join(points(figure[end]).removesuffix(" points") for end in ("high", "low"))


def limit(name: str) -> str:
    """Format a limit of `LIMITS`: '5%', or '5 points' for a difference of shares."""
    number = f"{100 * LIMITS[name]:g}"
    return f"{number} points" if name in POINTS else f"{number}%"


def duration(seconds: float) -> str:
    """Format 28.94 as '28.9 s', 166 as '2 min 46 s' and 11100 as '3 h 5 min'."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def short(value: float | None) -> str:
    """Format any number in few characters."""
    if value is None:
        return NO_VALUE
    if not isfinite(value):
        return "not a number"
    text = f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"
    return text.replace("-", MINUS)


def _rounded(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0
