"""Is something recognizable drawn for prompts of the concept, by how sure the judge is of what it sees.

unclear_before, unclear_after: share of images without a clear object: no object has a probability above `CLEAR`. An
    image that shows nothing is unclear too, however sure the judge is of that, because its prompt asked for something.
unclear_drop: before minus after, over pairs of the same prompt and seed; below 0 more images are unclear than before.
confidence: [{name, before, after}], the shares of images by that probability; the first are those that show nothing.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.detectors.base import NOTHING
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import paired_drop, share

CLEAR = 0.8
"""Probability of an object above which it is clear."""
_EDGES = (0.0, 0.5, CLEAR, 0.95, 0.99, 1.0)


def unclear(row: Row) -> bool:
    """Return whether an image shows no clear object."""
    return not row["something"] or row["confidence"] <= CLEAR


def _measure(comparison: Comparison) -> Measured:
    before, after = comparison.erase.before, comparison.erase.after
    counts = [Counter(_bin(row) for row in rows) for rows in (before, after)]
    bins = [NOTHING, *(f"{low:g} to {high:g}" for low, high in pairwise(_EDGES))]
    shares = [
        {"name": name, "before": counts[0][number] / len(before), "after": counts[1][number] / len(after)}
        for number, name in enumerate(bins)
    ]
    flags_before, flags_after = [unclear(row) for row in before], [unclear(row) for row in after]
    figures = {
        "unclear_before": share(flags_before),
        "unclear_after": share(flags_after),
        "unclear_drop": paired_drop(flags_before, flags_after),
    }
    return Measured(figures, {"confidence": shares})


def _bin(row: Row) -> int:
    """Return 0 for an image that shows nothing, else the number of the interval, which contains its upper end."""
    return 1 + sum(row["confidence"] > edge for edge in _EDGES[1:-1]) if row["something"] else 0


COHERENCE = Metric(columns=("something", "confidence"), measure=_measure)
