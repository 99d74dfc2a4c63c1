"""A run as workers see it."""

from __future__ import annotations

from dataclasses import dataclass

from vce_ray.concepts.concept import Concept
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store


@dataclass(frozen=True)
class Task:
    """Everything that workers need to know about a run. Cheap to pickle."""

    name: str
    config: RunConfig
    concept: Concept
    store: Store
    """The run's own store: every path of the run is relative to it."""
