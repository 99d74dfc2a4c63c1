"""Is the concept gone: shares of images of prompts for the concept that still show it, or that show anything at all.

seen_before, seen_after: share of images in which any judge sees the concept (judges.py).
held_out_before, held_out_after: the same over prompt templates that made no training pairs.
something_before, something_share: share of images that show any object; an erasure that leaves the model drawing
    nothing shows here.
"""

from __future__ import annotations

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.detectors.base import NOTHING
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import share
from vce_ray.evaluation.metrics.judges import seen


def _measure(comparison: Comparison) -> Measured:
    concept, erase = comparison.concept, comparison.erase
    before, after = erase.before, erase.after
    return Measured(
        {
            "seen_before": share(seen(row, concept) for row in before),
            "seen_after": share(seen(row, concept) for row in after),
            "held_out_before": share(seen(row, concept) for row in before if row["template_held_out"]),
            "held_out_after": share(seen(row, concept) for row in after if row["template_held_out"]),
            "something_before": share(_something(before, concept)),
            "something_share": share(_something(after, concept)),
        }
    )


def _something(rows: list[Row], concept: Concept) -> list[bool]:
    """Whether each image shows any object.

    Rows without the column `something` are judged by their label, except for a style, whose labels are not objects.
    """
    flags = [
        row.get("something") if "something" in row or concept.kind == "style" else row["label"] != NOTHING
        for row in rows
    ]
    return [flag for flag in flags if flag is not None]


ERASED = Metric(columns=("label", "template_held_out"), measure=_measure)
