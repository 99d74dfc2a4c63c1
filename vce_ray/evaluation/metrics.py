"""Figures of an erasure from per-image rows: is the concept gone, did its neighbours stay, are pictures as good.

Pure functions of a table; knows no model, no judge and no files. Every share comes with the number of images
behind it and a 95 % interval: Wilson's for a share, Newcombe's (made of two Wilson intervals) for a difference.
Before and after are drawn from the same prompts and seeds; a table where they are not is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.errors import UserError

Row = dict[str, Any]
Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
NOTHING = "nothing"
ARMS = ("before", "after")
COLUMNS = ("arm", "group", "prompt", "template_held_out", "name", "seed", "label", "score")
BARS = {"seen_after": 0.05, "worst_neighbour_drop": 0.05, "kept_drop": 0.02, "score_drop": 0.02}
"""What an erasure may not exceed: shares of images; score_drop is relative."""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval and the number of images behind it; all None where there are no images."""

    value: float | None
    low: float | None
    high: float | None
    images: int


NO_FIGURE = Figure(None, None, None, 0)


def evaluate(rows: pa.Table | Sequence[Row], concept: Concept) -> dict[str, Any]:
    """All figures of an evaluation, in JSON's types: what metrics.json holds.

    `COLUMNS` are read, and `something` (bool: any object is seen) where there is one; without it a label other
    than 'nothing' is something, and for a style, whose labels say nothing of objects, the figure stays None.

    Returns:
        Plain numbers (shares and drops in 0..1, so 0.05 is 5 points; None where no image bears on one):
        seen_before, seen_after: share of erase images in which the judge sees the concept.
        held_out_before, held_out_after: the same over the wordings that made no training pairs.
        something_before, something_share: share of erase images before and after in which any object is seen; an
            erasure that draws nothing any more shows here.
        kept_before, kept_after, kept_drop: share of all neighbours' images that are named right.
        worst_neighbour, worst_neighbour_drop: the neighbour that lost most, and how much.
        score_before, score_after: mean cosine of image and prompt over keep images, whole keep prompts too.
        score_drop: relative, 0.01 is 1 % lower than before.
        images: all images judged, before and after, erase and keep.
        and `figures`, the same by name as {value, low, high, images}; and `neighbours`, largest drop first, each
        {name, before, after, drop} of such figures.

    Raises:
        UserError: a column is missing, there are no erase or no keep images, an arm or a group is unknown, or
            before and after were not drawn from the same prompts and seeds.
    """
    listed = list(rows) if isinstance(rows, Sequence) else rows.to_pylist()
    _check(listed)
    erase, keep = (
        [sorted((r for r in listed if (r["arm"], r["group"]) == (arm, group)), key=_identity) for arm in ARMS]
        for group in ("erase", "keep")
    )
    seen = [[row["label"] in concept.names for row in arm] for arm in erase]
    held_out = [[row["label"] in concept.names for row in arm if row["template_held_out"]] for arm in erase]
    something = [[flag for row in arm if (flag := _something(row, concept)) is not None] for arm in erase]
    right = [[row["label"] == row["name"] for row in arm if row["name"]] for arm in keep]
    scores = [[row["score"] for row in arm] for arm in keep]
    figures = {
        "seen_before": share(seen[0]),
        "seen_after": share(seen[1]),
        "held_out_before": share(held_out[0]),
        "held_out_after": share(held_out[1]),
        "something_before": share(something[0]),
        "something_share": share(something[1]),
        "kept_before": share(right[0]),
        "kept_after": share(right[1]),
        "kept_drop": drop(share(right[0]), share(right[1])),
        "score_before": mean(scores[0]),
        "score_after": mean(scores[1]),
        "score_drop": relative_drop(*scores),
    }
    neighbours = _neighbours(*keep)
    worst = neighbours[0] if neighbours else None
    return {
        **{name: figure.value for name, figure in figures.items()},
        "worst_neighbour": worst["name"] if worst else None,
        "worst_neighbour_drop": worst["drop"]["value"] if worst else None,
        "images": len(listed),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "neighbours": neighbours,
    }


def evaluation_row(metrics: dict[str, Any], concept: str, method: str, seed: int, command: str) -> Row:
    """One line of a table of evaluations: the figures of `evaluate` as plain numbers, and the command to redo it."""
    names = ("seen_before", "seen_after", "worst_neighbour_drop", "kept_drop", "score_drop")
    return {
        "concept": concept,
        "method": method,
        "images": metrics["figures"]["seen_after"]["images"],
        **{name: metrics[name] for name in names},
        "seed": seed,
        "command": command,
    }


def missed_bars(metrics: dict[str, Any]) -> list[str]:
    """The keys of `BARS` that an erasure exceeds, in their order; what lies on its bar has met it."""
    return [name for name, bar in BARS.items() if metrics[name] is not None and metrics[name] > bar + 1e-9]


def share(flags: Iterable[bool]) -> Figure:
    """The share of true flags, with Wilson's interval."""
    flags = list(flags)
    number = len(flags)
    if not number:
        return NO_FIGURE
    value = sum(map(bool, flags)) / number
    centre = (value + Z * Z / (2 * number)) / (1 + Z * Z / number)
    half = Z / (1 + Z * Z / number) * sqrt(value * (1 - value) / number + Z * Z / (4 * number * number))
    low = 0.0 if value == 0 else centre - half  # exactly: rounding would leave 1e-18 there
    return Figure(value, low, 1.0 if value == 1 else centre + half, number)


def drop(before: Figure, after: Figure) -> Figure:
    """Before minus after of two shares, with Newcombe's interval.

    It takes the two samples for independent. Ours share prompts and seeds, so it is rather too wide than too narrow.
    """
    p, p_low, p_high = before.value, before.low, before.high
    q, q_low, q_high = after.value, after.low, after.high
    if p is None or p_low is None or p_high is None or q is None or q_low is None or q_high is None:
        return NO_FIGURE
    low = p - q - sqrt((p - p_low) ** 2 + (q_high - q) ** 2)
    high = p - q + sqrt((p_high - p) ** 2 + (q - q_low) ** 2)
    return Figure(p - q, low, high, before.images + after.images)


def mean(values: Sequence[float]) -> Figure:
    """The mean, with the normal interval of its standard error; one value alone is its own interval."""
    number = len(values)
    if not number:
        return NO_FIGURE
    centre, error = _mean_and_error(values)
    return Figure(centre, centre - Z * error, centre + Z * error, number)


def relative_drop(before: Sequence[float], after: Sequence[float]) -> Figure:
    """By which part of its mean a score fell; the interval is that of the paired differences.

    None where the mean before is not above 0: no part of it can be told then.
    """
    if not before or (base := sum(before) / len(before)) <= 0:
        return NO_FIGURE
    fall, error = _mean_and_error([was - now for was, now in zip(before, after, strict=True)])
    return Figure(fall / base, (fall - Z * error) / base, (fall + Z * error) / base, len(before) + len(after))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    number = len(values)
    centre = sum(values) / number
    return centre, sqrt(sum((value - centre) ** 2 for value in values) / max(1, number - 1) / number)


def _neighbours(before: list[Row], after: list[Row]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(row["name"] for row in before if row["name"]):
        was, now = (share(row["label"] == name for row in arm if row["name"] == name) for arm in (before, after))
        rows.append({"name": name, "before": asdict(was), "after": asdict(now), "drop": asdict(drop(was, now))})
    return sorted(rows, key=lambda row: (-row["drop"]["value"], row["name"]))


def _something(row: Row, concept: Concept) -> bool | None:
    if "something" in row or concept.kind == "style":
        return row.get("something")
    return row["label"] != NOTHING


def _identity(row: Row) -> tuple[str, str, str, int]:
    return row["group"], row["name"] or "", row["prompt"], row["seed"]


def _check(rows: list[Row]) -> None:
    for row in rows:
        if missing := [name for name in COLUMNS if name not in row]:
            raise UserError(f"an evaluation row has no {missing[0]!r}: it needs {', '.join(COLUMNS)}")
        if row["arm"] not in ARMS or row["group"] not in ("erase", "keep"):
            raise UserError(
                f"arm {row['arm']!r}, group {row['group']!r}: arms are before and after, groups erase and keep"
            )
    for group in ("erase", "keep"):
        if not any(row["group"] == group for row in rows):
            raise UserError(f"no {group} images to evaluate: draw some before and after")
    before, after = (Counter(_identity(row) for row in rows if row["arm"] == arm) for arm in ARMS)
    if lone := (before - after) + (after - before):
        group, _, prompt, seed = min(lone)
        raise UserError(
            f"{sum(lone.values())} images are in one arm only, such as {group} {prompt!r} with seed {seed}: "
            "before and after must be drawn from the same prompts and seeds"
        )
