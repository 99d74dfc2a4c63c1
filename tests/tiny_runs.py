"""The smallest erasure that takes every path, as users give it; what tests share of it is in conftest.py."""

from __future__ import annotations

import os
import sys

TINY = ["--pairs", "6", "--keep", "8", "--steps", "3", "--judged", "8", "--judged-keep", "12", "--batch-size", "3"]
VCE_RAY = [sys.executable, "-m", "vce_ray"]
ONE = ["--actors", "1"]
"""An actor takes longer to start than a run has work for."""
COMMAND = [*VCE_RAY, "erase", "deer", *TINY, *ONE]
NAME = "deer-vsafe-dpo-0"
"""Of the run that COMMAND makes."""
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
