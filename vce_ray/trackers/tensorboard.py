"""TensorBoard: event files in a local folder. Needs no server and no torch."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence

from vce_ray.trackers.base import TrackedRun, Tracker, by_section, flat


class TensorBoard(Tracker):
    """Settings as a text, one chart for each metric, and one image."""

    name = "tensorboard"
    packages = ("tensorboardX", "tensorboard")  # the first writes, the second shows

    def __init__(self, run: TrackedRun):
        """Create the folder. The event file is created when there is something to write."""
        run.folder.mkdir(parents=True, exist_ok=True)
        self.where = f"tensorboard --logdir {run.folder}"
        self._run = run
        self._writer = None

    def log_steps(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write scalars. They replace those that an earlier process wrote from the first of these steps on."""
        writer = self._open(int(rows[0]["step"]))
        for row in rows:
            for name, value in by_section("training", row).items():
                writer.add_scalar(name, value, int(row["step"]))
        writer.flush()

    def log_evaluation(self, figures: Mapping[str, float], image_png: bytes, step: int) -> None:
        """Write each figure as a chart with one point."""
        import numpy as np
        from PIL import Image

        writer = self._open(step)
        for name, value in by_section("evaluation", figures).items():
            writer.add_scalar(name, value, step)
        pixels = np.asarray(Image.open(io.BytesIO(image_png)).convert("RGB"))
        writer.add_image("before_after", pixels, step, dataformats="HWC")
        writer.flush()

    def close(self, status: str) -> None:
        """Close the file; how the run ended is not shown."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, first_step: int):
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # files of a folder are read in the order of their names, which have the time in whole seconds only
            suffix = f".{time.time_ns()}"
            self._writer = SummaryWriter(str(self._run.folder), purge_step=first_step, filename_suffix=suffix)
            table = ["| setting | |", "|---|---|"]
            table += [f"| {name} | {value} |" for name, value in flat(self._run.settings).items()]
            self._writer.add_text("settings", "\n".join(table))
        return self._writer
