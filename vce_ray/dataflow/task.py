"""A run as workers see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vce_ray.concepts.concept import Concept
from vce_ray.config import DETECTORS
from vce_ray.models.folder import absolute
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

    def for_workers(self) -> Task:
        """Return the task as processes with another working directory understand it: with absolute model folders.

        The record of the run keeps them as they were given. Hub ids and URIs are left alone: each node fetches them.
        """
        config = self.config
        judges = tuple(name if name in DETECTORS else absolute(name) for name in config.evaluation.judge)
        runner, colon, captioner = (config.captioner or "").rpartition("vllm:")
        resolved = {
            "base": absolute(config.base),
            "captioner": f"{runner}{colon}{absolute(captioner)}" if captioner else None,
            "evaluation": config.evaluation.model_copy(update={"judge": judges}),
        }
        return replace(self, config=config.model_copy(update=resolved))
