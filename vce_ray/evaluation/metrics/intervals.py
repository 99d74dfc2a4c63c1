"""Shares, means and their changes, each with a 95% interval and the number of images behind it.

Wilson's interval for a share; Newcombe's, made of two Wilson intervals, for a difference of shares, of independent or
paired samples; the normal interval of the standard error for a mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

Z = 1.959964
"""Standard normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class Figure:
    """A value, its 95% interval and the number of images behind it. Without images all but `images` are None."""

    value: float | None
    low: float | None
    high: float | None
    images: int


NO_FIGURE = Figure(None, None, None, 0)


def share(flags: Iterable[bool]) -> Figure:
    """Return the share of true flags, with Wilson's interval."""
    flags = list(flags)
    number = len(flags)
    if not number:
        return NO_FIGURE
    value = sum(map(bool, flags)) / number
    centre = (value + Z * Z / (2 * number)) / (1 + Z * Z / number)
    half = Z / (1 + Z * Z / number) * sqrt(value * (1 - value) / number + Z * Z / (4 * number * number))
    # The interval of 0 begins at exactly 0 and that of 1 ends at exactly 1; the formula is off by a rounding error.
    low = 0.0 if value == 0 else centre - half
    high = 1.0 if value == 1 else centre + half
    return Figure(value, low, high, number)


def drop(before: Figure, after: Figure) -> Figure:
    """Return before minus after for two shares, with Newcombe's interval.

    The interval assumes independent samples. Ours share prompts and seeds, so it tends to be too wide.
    """
    p, p_low, p_high = before.value, before.low, before.high
    q, q_low, q_high = after.value, after.low, after.high
    if p is None or p_low is None or p_high is None or q is None or q_low is None or q_high is None:
        return NO_FIGURE
    low = p - q - sqrt((p - p_low) ** 2 + (q_high - q) ** 2)
    high = p - q + sqrt((p_high - p) ** 2 + (q - q_low) ** 2)
    return Figure(p - q, low, high, before.images + after.images)


def paired_drop(before: Sequence[bool], after: Sequence[bool]) -> Figure:
    """Return before minus after for two shares of the same images, with Newcombe's interval for paired samples.

    Row i of both has the same prompt and seed. The interval is that of `drop` less what the correlation explains: the
    square-and-add interval of Newcombe, Statistics in Medicine 17 (1998), 2635, method 10.
    """
    first, second, number = share(before), share(after), len(before)
    p, p_low, p_high = first.value, first.low, first.high
    q, q_low, q_high = second.value, second.low, second.high
    if p is None or p_low is None or p_high is None or q is None or q_low is None or q_high is None:
        return NO_FIGURE
    both = sum(a and b for a, b in zip(before, after, strict=True))
    only_before, only_after = sum(map(bool, before)) - both, sum(map(bool, after)) - both
    neither = number - both - only_before - only_after
    margins = (both + only_before) * (only_after + neither) * (both + only_after) * (only_before + neither)
    excess = both * neither - only_before * only_after
    if excess > 0:
        excess = max(excess - number / 2, 0)  # continuity correction of a positive correlation
    correlation = excess / sqrt(margins) if margins else 0.0

    def reach(end: float, other: float) -> float:
        return sqrt(max(0.0, end**2 - 2 * correlation * end * other + other**2))

    return Figure(p - q, p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low), 2 * number)


def mean(values: Sequence[float]) -> Figure:
    """Return the mean, with the normal interval of its standard error; for a single value it has zero width."""
    number = len(values)
    if not number:
        return NO_FIGURE
    centre, error = _mean_and_error(values)
    return Figure(centre, centre - Z * error, centre + Z * error, number)


def relative_drop(before: Sequence[float], after: Sequence[float]) -> Figure:
    """Return the drop of the mean as a fraction of the mean before, with the interval of the paired differences.

    No figure if the mean before is not above 0, where a fraction of it has no meaning.
    """
    if not before or (base := sum(before) / len(before)) <= 0:
        return NO_FIGURE
    difference, error = _mean_and_error([old - new for old, new in zip(before, after, strict=True)])
    low, high = difference - Z * error, difference + Z * error
    return Figure(difference / base, low / base, high / base, len(before) + len(after))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    number = len(values)
    centre = sum(values) / number
    return centre, sqrt(sum((value - centre) ** 2 for value in values) / max(1, number - 1) / number)
