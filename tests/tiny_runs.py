"""The smallest erasure that has every stage, as users start it. conftest.py has the runs that tests share."""

from __future__ import annotations

import os
import sys
from typing import Any

from vce_ray.run_config import RunConfig

TINY = ["--pairs", "6", "--keep", "8", "--steps", "3", "--judged", "8", "--judged-keep", "12", "--batch-size", "3"]
VCE_RAY = [sys.executable, "-m", "vce_ray"]
ONE = ["--actors", "1"]
"""One actor: more take longer to start than this run has work for."""
COMMAND = [*VCE_RAY, "erase", "deer", *TINY, *ONE]
NAME = "deer-vsafe-dpo-0"
"""Name of the run that COMMAND makes."""
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}


def tiny_config(**settings: Any) -> RunConfig:
    """Settings of a run that erases deer from the embedded model, complete without looking anything up."""
    return RunConfig.model_validate(
        {"concept": "deer", "sampling": {"guidance_scale": 2.0, "temperature": 0.7}} | settings
    )
