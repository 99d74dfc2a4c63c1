"""Settings of a short training, and trainings run to their end, shared by the tests of training."""

from __future__ import annotations

from typing import Any

from vce_ray.config import SamplingConfig
from vce_ray.run_config import RunConfig
from vce_ray.training.objectives.vsafe_dpo import VSafeDPOConfig

PAIRS = 8


def run_config(**changes: Any) -> RunConfig:
    """A short training on one worker."""
    train = {"steps": 4, "batch_size": 4, "keep_batch_size": 4, "learning_rate": 2e-3}
    train |= {"checkpoint_every": 50, "num_workers": 1}
    return RunConfig(concept="deer", sampling=SamplingConfig(), train=VSafeDPOConfig(**(train | changes)))
