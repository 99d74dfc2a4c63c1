"""The trackers of a run (vce_ray/trackers/), as the driver uses them.

A tracker must never cost a run: whatever one raises is reported once, and the run goes on without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.errors import format_error
from vce_ray.evaluation.images import before_after_png
from vce_ray.evaluation.report import ReportData
from vce_ray.pipeline.stages import TRACKING_FILE
from vce_ray.trackers import TRACKERS, TrackedRun, Tracker

STEPS_AT_ONCE = 10
"""Training steps that are shown together."""


class Tracking:
    """What is shown of one run by the trackers in its settings, if there are any."""

    def __init__(self, task: Task, log: Callable[[str], None]):
        self._task, self._log = task, log
        self._trackers: list[Tracker] = []
        self._lock = Lock()
        self._waiting: list[Row] = []
        self._last_step = 0

    def open(self, record: Row) -> None:
        """Open the trackers of a run that starts or resumes.

        Args:
            record: content of run.json.
        """
        if not self._task.config.track:
            return
        run = TrackedRun(self._key(), self._task.name, self._settings(record), self._folder())
        for name in dict.fromkeys(self._task.config.track):
            try:
                tracker = TRACKERS[name](run)
            except Exception as error:
                self._report(name, error)
            else:
                self._trackers.append(tracker)
                self._log(f"tracked by {name}: {tracker.where}")

    def log_step(self, row: Row) -> None:
        """Show a training step, together with others, as a server may take a while to answer.

        Steps that were shown before, such as those that a training repeats when it lost a worker, are left out.
        """
        if row["step"] > self._last_step:
            self._last_step = row["step"]
            self._waiting.append(row)
        if len(self._waiting) >= STEPS_AT_ONCE:
            self._log_waiting()

    def log_evaluation(self, data: ReportData) -> None:
        """Show the figures and images of a report, after any steps that were not shown yet."""
        if not self._trackers:
            return
        for row in data.training:
            self.log_step(row)
        self._log_waiting()
        image = BytesIO()
        before_after_png(data.evaluation, image)
        figures = figures_of(data.metrics)
        self._each(lambda tracker: tracker.log_evaluation(figures, image.getvalue(), data.training[-1]["step"]))

    def close(self, status: Any) -> None:
        """Close all trackers: the run is done, failed or stopped."""
        self._log_waiting()
        self._each(lambda tracker: tracker.close(status))
        self._trackers = []

    def _log_waiting(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            self._each(lambda tracker: tracker.log_steps(rows))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        with self._lock:  # steps come from the thread that listens to trainings
            for tracker in list(self._trackers):
                try:
                    action(tracker)
                except Exception as error:
                    self._trackers.remove(tracker)
                    self._report(tracker.name, error)

    def _report(self, name: str, error: Exception) -> None:
        text = re.sub(r"://[^/\s@]*@", "://", format_error(error))  # credentials in the address of a server
        self._log(f"tracker {name} failed, and the run goes on without it: {text}")

    def _key(self) -> str:
        """Return the key of the run, the same until its training is made anew."""
        store = self._task.store
        if not store.exists(TRACKING_FILE):
            store.write_json(TRACKING_FILE, {"key": uuid4().hex})
        return store.read_json(TRACKING_FILE)["key"]

    def _settings(self, record: Row) -> Row:
        concept = self._task.concept.model_dump(mode="json", include={"kind", "names", "keep"})
        made_by = {"versions": record["versions"], "git": record["git"], "store": self._task.store.where()}
        return record["config"] | concept | made_by

    def _folder(self) -> Path:
        store = self._task.store
        return Path("tensorboard", self._task.name).absolute() if store.in_bucket else Path(store.root, "tensorboard")


def figures_of(metrics: Row) -> dict[str, float]:
    """Return all numbers of metrics.json by name, and the ends of their intervals as name_low and name_high."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    for name, figure in metrics["figures"].items():
        numbers |= {f"{name}_{end}": figure[end] for end in ("low", "high") if figure[end] is not None}
    return numbers
