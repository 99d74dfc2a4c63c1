"""What workers know of a run."""

from __future__ import annotations

from dataclasses import dataclass

from vce_ray.concepts.concept import Concept
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store


@dataclass(frozen=True)
class Task:
    """What workers know of a run."""

    name: str
    config: RunConfig
    concept: Concept
    store: Store
