"""Trackers: each shows a run in a tool for experiments. `TRACKERS` lists them; `base.py` documents the protocol.

Importing this package loads none of their libraries.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from vce_ray.errors import UserError
from vce_ray.trackers.base import TrackedRun, Tracker
from vce_ray.trackers.mlflow import MLflow
from vce_ray.trackers.tensorboard import TensorBoard
from vce_ray.trackers.wandb import WandB

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "check_trackers"]

TRACKERS: dict[str, type[Tracker]] = {
    tracker.name: tracker
    for tracker in (
        TensorBoard,
        MLflow,
        WandB,
    )
}
"""All trackers, by the name that `--track` takes."""


def check_trackers(names: Iterable[str]) -> None:
    """Check that these trackers can be used. Loads and contacts none of them.

    Raises:
        UserError: a name is unknown, or what a tracker needs is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r}: use one of {', '.join(TRACKERS)}")
        if missing := [package for package in TRACKERS[name].packages if find_spec(package) is None]:
            raise UserError(
                f"tracker {name} needs {' and '.join(missing)}, not installed here: run pip install '.[{name}]' in a "
                "checkout"
            )
