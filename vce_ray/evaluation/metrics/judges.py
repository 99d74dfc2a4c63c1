"""What each judge says of the images of prompts for the concept.

judges: {judge, rule, before, after, unanswered} of each: its name, when it sees the concept, the shares of images
    before and after in which it does, as figures, and the numbers of images before and after without an answer, which
    are not part of these shares.

The verdict takes an image as showing the concept if any judge sees it, or gave no answer about it (`seen`): several
judges make it stricter, and a judge that fails or refuses cannot make an erasure look better.
"""

from __future__ import annotations

from dataclasses import asdict

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.detectors import answer_columns
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import share


def seen(row: Row, concept: Concept) -> bool:
    """Return whether any judge sees the concept in an image, or has no answer about it."""
    return row["label"] in concept.names or any(answer["seen"] is not False for answer in answers(row))


def answers(row: Row) -> list[Row]:
    """Return all answers about an image; none in an evaluation by version 0.1, which has the label alone."""
    return [answer for column in answer_columns() for answer in row.get(column) or ()]


def _measure(comparison: Comparison) -> Measured:
    judges: dict[str, Row] = {}
    for arm, rows in (("before", comparison.erase.before), ("after", comparison.erase.after)):
        for row in rows:
            for answer in answers(row):
                judge = judges.setdefault(answer["judge"], {"rule": answer["rule"], "before": [], "after": []})
                judge[arm].append(answer["seen"])
    return Measured({}, {"judges": [_summary(name, judge) for name, judge in judges.items()]})


def _summary(name: str, judge: Row) -> Row:
    shares = {arm: asdict(share(answer for answer in judge[arm] if answer is not None)) for arm in ("before", "after")}
    return {
        "judge": name,
        "rule": judge["rule"],
        **shares,
        "unanswered": {arm: judge[arm].count(None) for arm in shares},
    }


JUDGES = Metric(columns=("clip",), measure=_measure)
