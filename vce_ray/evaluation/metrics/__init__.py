"""Metrics of an erasure: is the concept gone, and is what should stay still drawn, beside it and in its place.

`METRICS` lists them; `base.py` documents the protocol, each module the figures it adds to metrics.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.errors import UserError
from vce_ray.evaluation.metrics.asked import ASKED
from vce_ray.evaluation.metrics.base import IDENTITY, Metric, compare
from vce_ray.evaluation.metrics.body_parts import BODY_PARTS
from vce_ray.evaluation.metrics.coherence import COHERENCE
from vce_ray.evaluation.metrics.erased import ERASED
from vce_ray.evaluation.metrics.image_text import IMAGE_TEXT
from vce_ray.evaluation.metrics.intervals import Figure
from vce_ray.evaluation.metrics.judges import JUDGES
from vce_ray.evaluation.metrics.kept import KEPT
from vce_ray.evaluation.metrics.kid import KID
from vce_ray.evaluation.metrics.refined_text import REFINED_TEXT

METRICS: tuple[Metric, ...] = (
    ERASED,  # seen, held_out, something
    KEPT,  # kept, worst_neighbour, neighbours
    IMAGE_TEXT,  # score
    ASKED,  # asked_<slot>, asked, worst_asked
    COHERENCE,  # unclear, confidence
    KID,  # kid
    REFINED_TEXT,  # refined_score
    JUDGES,  # judges
    BODY_PARTS,  # exposed_0.2, exposed_0.6, body_parts
)
"""All metrics, in the order of their figures."""
REQUIRED = tuple(dict.fromkeys((*IDENTITY, *ERASED.columns, *KEPT.columns, *IMAGE_TEXT.columns)))
"""Columns that every evaluation has: the limits and the report depend on the metrics that read them."""


def columns_to_read(schema: pa.Schema) -> list[str]:
    """Return the columns of an evaluation table that `evaluate` needs: images only if a metric reads them."""
    return [name for name in schema.names if name != "image" or any(name in metric.columns for metric in METRICS)]


def evaluate(rows: pa.Table | Sequence[Row], concept: Concept) -> dict[str, Any]:
    """Compute all metrics of an evaluation: the content of metrics.json.

    Args:
        rows: the evaluation table, before and after, in any order; `columns_to_read` names the columns needed.
        concept: the concept that was erased.

    Returns:
        JSON types. At the top level each figure's plain value by its name (shares and drops in 0..1, so 0.05 is
        5 points; None if there are no images for it) and the metrics' details; `images`, the number of images before
        and after, erase and keep; and `figures`, {value, low, high, images} by name.

    Raises:
        UserError: a column is missing, there are no erase or no keep images, an arm or a group is unknown, or
            before and after were not drawn from the same prompts and seeds.
    """
    listed = list(rows) if isinstance(rows, Sequence) else rows.to_pylist()
    for row in listed:
        if missing := [name for name in REQUIRED if name not in row]:
            raise UserError(f"an evaluation row has no {missing[0]!r}: it needs {', '.join(REQUIRED)}")
    comparison = compare(listed, concept)
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {}
    for metric in METRICS:
        if all(name in row for row in listed for name in metric.columns):
            measured = metric.measure(comparison)
            if taken := (measured.figures.keys() | measured.details.keys()) & (figures.keys() | details.keys()):
                raise ValueError(f"two metrics return {min(taken)!r}: rename one of them")
            figures |= measured.figures
            details |= measured.details
    return {
        **{name: figure.value for name, figure in figures.items()},
        **details,
        "images": len(listed),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
    }
