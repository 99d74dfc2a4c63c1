"""Weights & Biases: a run in the project WANDB_PROJECT; with WANDB_MODE=offline in a local folder, to sync later."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from vce_ray.env import WANDB_PROJECT
from vce_ray.trackers.base import TrackedRun, Tracker, by_section


class WandB(Tracker):
    """Config, history, figures as the run's summary, and the image."""

    name = "wandb"
    packages = ("wandb",)

    def __init__(self, run: TrackedRun):
        """Create the run of this key, or resume it."""
        import wandb

        self._run = wandb.init(
            project=WANDB_PROJECT.get(),
            id=run.key,
            name=run.name,
            config=dict(run.settings),
            allow_val_change=True,  # of versions, when a run resumes
            resume="allow",
            reinit="create_new",  # the runs of a fleet are open at once
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.where = f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else str(self._run.url)

    def log_steps(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log metrics of the steps that the run does not have yet."""
        for row in rows:
            if row["step"] >= self._run.step:  # the step that a resumed run goes on with
                self._run.log(by_section("training", row), step=int(row["step"]))

    def log_evaluation(self, figures: Mapping[str, float], image_png: bytes, step: int) -> None:
        """Set the figures in the summary, and log the image."""
        import wandb
        from PIL import Image

        self._run.summary.update(by_section("evaluation", figures))
        self._run.log({"before_after": wandb.Image(Image.open(io.BytesIO(image_png)))})

    def close(self, status: str) -> None:
        """Wait until all is sent, and mark a failed run as such."""
        self._run.finish(exit_code=1 if status == "failed" else 0)
