"""MLflow: a run on the server, or in the database, that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence

from vce_ray.env import MLFLOW_EXPERIMENT_NAME
from vce_ray.trackers.base import TrackedRun, Tracker, by_section, flat

KEY = "vce_ray.key"
"""Tag by which a resumed run finds its run, whose id the server chose."""
BATCH = 100
"""Settings or metrics sent at once. MLflow takes at most 100 settings."""
MAX_VALUE = 500
"""Characters of a setting; older servers take no more."""
ENDED = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MLflow(Tracker):
    """Parameters, metrics, and the image as an artifact."""

    name = "mlflow"
    packages = ("mlflow",)

    def __init__(self, run: TrackedRun):
        """Find the run by its key, or create it, and its experiment, with all settings."""
        from mlflow import MlflowClient
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        experiment = MLFLOW_EXPERIMENT_NAME.get()
        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        known = self._client.search_runs([place], f"tags.`{KEY}` = '{run.key}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(place, run_name=run.name, tags={KEY: run.key}).info.run_id
            params = [Param(name, value[:MAX_VALUE]) for name, value in flat(run.settings).items()]
            for start in range(0, len(params), BATCH):
                self._client.log_batch(self._id, params=params[start : start + BATCH])
        losses = self._client.get_metric_history(self._id, "training/loss") if known else []
        self._logged = max((metric.step for metric in losses), default=0)
        self.where = f"experiment {experiment}, run {self._id}"

    def log_steps(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log metrics of the steps that the run does not have yet."""
        for row in rows:
            if row["step"] > self._logged:
                self._log(by_section("training", row), int(row["step"]))

    def log_evaluation(self, figures: Mapping[str, float], image_png: bytes, step: int) -> None:
        """Log figures as metrics of the last step, and the image as before_after.png."""
        from PIL import Image

        self._log(by_section("evaluation", figures), step)
        self._client.log_image(self._id, Image.open(io.BytesIO(image_png)), artifact_file="before_after.png")

    def close(self, status: str) -> None:
        """Mark the run as finished, failed or killed."""
        self._client.set_terminated(self._id, ENDED[status])

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + BATCH])
