"""Detectors: each adds columns to the evaluation table. `DETECTORS` lists them; `base.py` documents the protocol.

Importing this package loads no model library, so that the driver can read the columns.
"""

from __future__ import annotations

import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.schemas import evaluation
from vce_ray.evaluation.detectors.base import NOTHING, Detector
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.run_config import RunConfig

__all__ = ["DETECTORS", "NOTHING", "Detector", "detectors_for", "evaluation_schema"]

DETECTORS: tuple[type[Detector], ...] = (
    ClipDetector,  # label, seen, something, confidence, found, score, refined_score, embedding
)
"""All detectors, in the order of their columns."""


def detectors_for(config: RunConfig, concept: Concept) -> list[type[Detector]]:
    """Return the detectors that a run uses."""
    names = [detector.name for detector in DETECTORS]
    assert len(set(names)) == len(names), f"two detectors have the same name, but encodings are shared by name: {names}"
    return [detector for detector in DETECTORS if detector.applies(config, concept)]


def evaluation_schema(config: RunConfig, concept: Concept) -> pa.Schema:
    """Return the schema of a run's evaluation table: the common columns and those of its detectors."""
    return evaluation(detector.columns for detector in detectors_for(config, concept))
