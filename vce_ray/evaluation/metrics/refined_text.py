"""Do images of prompts for the concept fit what is left of the prompt: cosines with the prompt without the concept.

refined_score_before, refined_score_after: mean cosine; images whose prompt has nothing left do not count.
refined_score_drop: relative, over pairs of the same prompt and seed; below 0 images fit better than before.
"""

from __future__ import annotations

from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import mean, relative_drop


def _measure(comparison: Comparison) -> Measured:
    # the same prompt is refined to the same text, so both sides of a pair have a score or neither has
    before, after = (
        [score for score in scores if score is not None] for scores in comparison.erase.column("refined_score")
    )
    return Measured(
        {
            "refined_score_before": mean(before),
            "refined_score_after": mean(after),
            "refined_score_drop": relative_drop(before, after),
        }
    )


REFINED_TEXT = Metric(columns=("refined_score",), measure=_measure)
