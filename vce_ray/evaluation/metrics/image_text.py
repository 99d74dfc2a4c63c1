"""Do images still fit their prompts: cosines of image and prompt over all keep prompts, complete ones included.

score_before, score_after: mean cosine.
score_drop: relative; 0.01 is 1% lower than before.
"""

from __future__ import annotations

from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import mean, relative_drop


def _measure(comparison: Comparison) -> Measured:
    before, after = comparison.keep.column("score")
    return Measured(
        {"score_before": mean(before), "score_after": mean(after), "score_drop": relative_drop(before, after)}
    )


IMAGE_TEXT = Metric(columns=("score",), measure=_measure)
