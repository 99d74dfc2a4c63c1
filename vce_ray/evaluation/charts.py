"""Charts as inline SVG, without a library or script. Colours come from the page's CSS, which has a dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

from vce_ray.evaluation.formats import short

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
LINE_CLASSES = ("a", "b")
"""CSS classes of a chart's lines, in order: the page gives each a colour."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    values: Sequence[float]
    css: str
    """One of `LINE_CLASSES`."""


def line_chart(title: str, steps: Sequence[float], series: Sequence[Series]) -> Markup:
    """Return an SVG of one or several lines over the same steps, with a text for screen readers.

    Values that are not finite break the line; a chart without any finite value is an empty frame.
    """
    finite = [value for line in series for value in line.values if isfinite(value)]
    ticks = nice_ticks(min(finite), max(finite)) if finite else [0.0, 1.0]
    low, high = ticks[0], ticks[-1]
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    summary = "; ".join(f"{line.label} from {short(line.values[0])} to {short(line.values[-1])}" for line in series)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(summary)}">']
    for tick in ticks:
        css = "axis" if tick == 0 or tick == low else "rule"
        parts.append(f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for step, anchor in [(first, "start"), (last, "end")] if last > first else [(first, "middle")]:
        label = f"step {step:g}" if step == first else f"{step:g}"
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}</text>')
    for line in series:
        for run in _runs([(x(s), y(v)) if isfinite(v) else None for s, v in zip(steps, line.values, strict=True)]):
            if len(run) == 1:
                parts.append(f'<circle class="dot {line.css}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3"/>')
            else:
                points = " ".join(f"{px:.1f},{py:.1f}" for px, py in run)
                parts.append(f'<polyline class="line {line.css}" points="{points}"/>')
    return Markup("".join([*parts, "</svg>"]))


@dataclass(frozen=True)
class Change:
    """A change with its interval, and the largest loss allowed; all in one unit, and negative if something is lost."""

    value: float
    low: float
    high: float
    limit: float


def change_charts(changes: Sequence[Change]) -> tuple[Markup, list[Markup]]:
    """Return an axis and a plot for each change, on one scale, each as wide as its place on the page.

    A plot shows the change as a dot and its interval as a line; losses beyond the limit are shaded. Screen readers
    skip axis and plots: the page has the same numbers as text.
    """
    ends = [end for change in changes for end in (change.low, change.high, change.limit, 0.0)]
    ticks = nice_ticks(min(ends), max(ends), about=6)

    def x(value: float) -> str:
        return f"{100 * (value - ticks[0]) / (ticks[-1] - ticks[0]):.2f}%"

    labels = []
    for tick in ticks:
        anchor = "start" if tick == ticks[0] else "end" if tick == ticks[-1] else "middle"
        text = f"{'+' if tick > 0 else ''}{short(tick)}"
        labels.append(f'<text class="tick" x="{x(tick)}" y="14" text-anchor="{anchor}">{text}</text>')
    plots = []
    for change in changes:
        parts = [f'<rect class="beyond" width="{x(change.limit)}" height="100%"/>']
        for tick in ticks:
            css = "axis" if tick == 0 else "rule"
            parts.append(f'<line class="{css}" x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="100%"/>')
        parts.append(f'<line class="limit" x1="{x(change.limit)}" x2="{x(change.limit)}" y1="0" y2="100%"/>')
        parts.append(f'<line class="line a" x1="{x(change.low)}" x2="{x(change.high)}" y1="50%" y2="50%"/>')
        parts.append(f'<circle class="dot a" cx="{x(change.value)}" cy="50%" r="5"/>')
        plots.append(_fluid("plot", 28, parts))
    return _fluid("scale", 20, labels), plots


def share_bars(before: float, after: float) -> Markup:
    """Return two bars, a share before and one after, each as long as its part of the chart's width.

    Screen readers skip them: the page has the same numbers as text.
    """
    bars = [
        f'<rect class="bar {css}" y="{top}" width="{100 * value:.2f}%" height="9" rx="2"/>'
        for css, top, value in (("b", 4, before), ("a", 15, after))
    ]
    return _fluid("plot", 28, ['<rect class="track" y="2" width="100%" height="24" rx="3"/>', *bars])


def _fluid(css: str, height: int, parts: Sequence[str]) -> Markup:
    """Return an SVG whose x coordinates are percentages, so that it has any width without scaling its text."""
    return Markup(f'<svg class="{css}" height="{height}" aria-hidden="true">{"".join(parts)}</svg>')


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return about `about` evenly spaced round numbers, from at or below `low` to at or above `high`."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / about
    unit = 10.0 ** floor(log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = floor(low / step + 1e-6), ceil(high / step - 1e-6)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _runs(points: list[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Split points at the gaps (None); without empty runs."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]
