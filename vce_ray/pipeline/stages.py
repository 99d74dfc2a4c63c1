"""The stages of a run: the one table that everything else reads.

    prompts -> unsafe -> captions -> safe -> pairs, reference -> training -> evaluation -> report

docs/run.md describes what each stage holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from vce_ray.config import PROMPT_MODES
from vce_ray.dataflow import schemas
from vce_ray.models.adapter_location import MODEL_CARD
from vce_ray.storage.files import MANIFESTS
from vce_ray.training import HISTORY_FILE

METRICS_FILE = "evaluation/metrics.json"
REPORT_FILE = "report/index.html"
TRACKING_FILE = "tracking.json"
"""Key of the run for its trackers. A training that is made anew is shown as another run."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of a run."""

    name: str
    inputs: tuple[str, ...]
    """Stages that it reads."""
    runner: Literal["driver", "actors", "trainer"]
    """Who runs it: the driver, Ray Data actors, or Ray Train workers."""
    tables: tuple[str, ...] = ()
    """Parquet stages in the run's store that hold its rows."""
    schema: pa.Schema | None = None
    """Schema of rows that actors make; the first column is the key."""
    rejects: bool = False
    """Whether its rows may be rejected, into rejects/<name>."""
    invalidated: tuple[str, ...] = ()
    """Paths to delete when a stage that it depends on, or it itself, is to run again. A stage of actors loses only its
    manifest: finished rows stay, and only missing ones are made."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders of Parquet parts that it writes."""
        return (*self.tables, f"rejects/{self.name}") if self.rejects else self.tables


def _actors(name: str, source: str, schema: pa.Schema) -> StageSpec:
    manifests = tuple(f"{name}/{manifest}" for manifest in MANIFESTS)
    return StageSpec(name, (source,), "actors", (name,), schema, rejects=True, invalidated=manifests)


STAGES: tuple[StageSpec, ...] = (
    StageSpec("prompts", (), "driver", ("prompts", "evaluation/prompts"), schemas.PROMPTS),
    _actors("unsafe", "prompts", schemas.UNSAFE),
    _actors("captions", "unsafe", schemas.CAPTIONS),
    _actors("safe", "captions", schemas.SAFE),
    StageSpec("pairs", ("unsafe", "captions", "safe"), "driver", ("pairs", "keep"), invalidated=("pairs", "keep")),
    _actors("reference", "safe", schemas.reference(PROMPT_MODES)),
    StageSpec(
        "training",
        ("pairs", "reference"),
        "trainer",
        invalidated=("adapter", "checkpoints", HISTORY_FILE, TRACKING_FILE),
    ),
    StageSpec(
        "evaluation",
        ("prompts", "training"),
        "actors",
        ("evaluation/before", "evaluation/after"),
        invalidated=(METRICS_FILE, "evaluation/after"),  # images of the base stay: they depend on no training
    ),
    StageSpec("report", ("pairs", "training", "evaluation"), "driver", invalidated=("report", MODEL_CARD)),
)
"""All stages of a run, in order."""
NAMES = tuple(spec.name for spec in STAGES)
"""Names of all stages, in order."""
PAIR_FLOW = tuple(spec.name for spec in STAGES if spec.rejects)
"""Stages that actors make in one flow, in order."""


def stage(name: str) -> StageSpec:
    """Return the stage of that name."""
    return next(spec for spec in STAGES if spec.name == name)


def downstream(names: Iterable[str]) -> tuple[StageSpec, ...]:
    """Return these stages and all that depend on them, in order."""
    affected = set(names)
    for spec in STAGES:
        if affected.intersection(spec.inputs):
            affected.add(spec.name)
    return tuple(spec for spec in STAGES if spec.name in affected)


def upstream(name: str) -> tuple[StageSpec, ...]:
    """Return all stages that a stage depends on, in order, without itself."""
    needed = set(stage(name).inputs)
    for spec in reversed(STAGES):
        if spec.name in needed:
            needed.update(spec.inputs)
    return tuple(spec for spec in STAGES if spec.name in needed)


PAIR_STAGES = tuple(spec.name for spec in upstream("training") if spec.name != "prompts")
"""Stages that are done once the pair set is published and ready to train on."""
