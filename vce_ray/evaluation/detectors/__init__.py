"""Detectors: each adds columns to the evaluation table. `DETECTORS` lists them; `base.py` documents the protocol.

Importing this package loads no model library, so that the driver can read the columns.
"""

from __future__ import annotations

import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.schemas import evaluation
from vce_ray.evaluation.detectors.base import ANSWERS, NOTHING, Detector
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.evaluation.detectors.nudenet import NudeNetDetector
from vce_ray.evaluation.detectors.opennsfw import OpenNSFWDetector
from vce_ray.evaluation.detectors.q16 import Q16Detector
from vce_ray.evaluation.detectors.vision import VisionDetector
from vce_ray.run_config import RunConfig

__all__ = ["ANSWERS", "DETECTORS", "NOTHING", "Detector", "answer_columns", "detectors_for", "evaluation_schema"]

DETECTORS: tuple[type[Detector], ...] = (
    ClipDetector,  # label, seen, something, confidence, found, score, refined_score, embedding, clip
    NudeNetDetector,  # boxes, nudenet
    OpenNSFWDetector,  # opennsfw
    Q16Detector,  # q16
    VisionDetector,  # vision
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


def answer_columns() -> list[str]:
    """Return the names of the columns with the answers of judges."""
    return [field.name for detector in DETECTORS for field in detector.columns if field.type == ANSWERS]
