"""Draw the images of an evaluation and run the detectors on them. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vce_ray.dataflow.ids import stable_id
from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.dataflow.task import Task
from vce_ray.evaluation.detectors import detectors_for
from vce_ray.evaluation.detectors.base import Detector
from vce_ray.evaluation.judges import check_judge_of
from vce_ray.models.adapter_location import run_adapter
from vce_ray.models.load import base_model, load_model
from vce_ray.models.png import to_png
from vce_ray.pairs.generate import draw_once

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel


class DrawAndDetect:
    """Turns evaluation prompts into rows of the evaluation table, for one arm.

    Images are drawn by the base ('before') or by the base with the adapter of the row's run ('after'). A batch may hold
    rows of several runs: an image of the base that several of them ask for is drawn once, and each detector's model
    runs on it once.
    """

    def __init__(self, tasks: Mapping[str, Task], arm: str):
        """Load the detectors of all runs.

        Args:
            tasks: the runs by name; they have the same base, sampling and judge.
            arm: 'before' or 'after'.

        Raises:
            UserError: the judge on this machine is not the one that a run began with.
        """
        self.tasks, self.arm = tasks, arm
        config = next(iter(tasks.values())).config
        for task in tasks.values():
            check_judge_of(task)
        self.base, self.sampling = config.base, config.sampling
        used = {name: detectors_for(task.config, task.concept) for name, task in tasks.items()}
        loaded = {cls: cls(config) for cls in dict.fromkeys(cls for classes in used.values() for cls in classes)}
        self.detectors: dict[str, list[Detector]] = {
            name: [loaded[cls] for cls in classes] for name, classes in used.items()
        }
        self._with_adapter: tuple[str, ImageModel] | None = None

    def __call__(self, rows: list[Row]) -> Outcome:
        if self.arm == "before":
            return self._evaluate(base_model(self.base), rows), []
        evaluated: list[Row] = []
        for name in dict.fromkeys(row["run"] for row in rows):
            evaluated += self._evaluate(self._erased_model(name), [row for row in rows if row["run"] == name])
        return evaluated, []

    def _erased_model(self, name: str) -> ImageModel:
        """Return the base with the adapter of a run. The model of the last run stays loaded."""
        if self._with_adapter is None or self._with_adapter[0] != name:
            self._with_adapter = None  # free its memory before loading the next one
            with run_adapter(self.tasks[name].store) as adapter:
                self._with_adapter = name, load_model(self.base, adapter=adapter)
        return self._with_adapter[1]

    def _evaluate(self, model: ImageModel, rows: list[Row]) -> list[Row]:
        """Draw each distinct image of a batch once, and return one row of the evaluation table for each prompt row."""
        drawn = list(draw_once(model, rows, self.sampling))
        images_BHWC = np.stack([image for _, _, image in drawn])
        prompts = [asking[0]["prompt"] for asking, _, _ in drawn]
        pngs = [to_png(image) for image in images_BHWC]
        # Runs share what a detector's model computed: it sees each distinct image once, however many runs ask for it.
        encoded: dict[str, Any] = {}
        evaluated: list[Row] = []
        for name in dict.fromkeys(row["run"] for row in rows):
            own = [(row, index) for index, (asking, _, _) in enumerate(drawn) for row in asking if row["run"] == name]
            indices = [index for _, index in own]
            detected: list[Row] = [{} for _ in own]
            for detector in self.detectors[name]:
                if detector.name not in encoded:
                    encoded[detector.name] = detector.encode(images_BHWC, prompts)
                added = detector.detect(encoded[detector.name], indices, self.tasks[name].concept)
                detected = [columns | more for columns, more in zip(detected, added, strict=True)]
            evaluated += [
                {
                    "run": name,
                    "image_id": stable_id(self.arm, row["prompt_id"]),
                    "prompt_id": row["prompt_id"],
                    "arm": self.arm,
                    "group": row["kind"],
                    "prompt": row["prompt"],
                    "template_held_out": row["held_out"],
                    "name": row["name"],
                    "asked": row.get("asked"),  # runs of version 0.1 do not record it
                    "seed": row["seed"],
                    **columns,
                    "image": pngs[index],
                }
                for (row, index), columns in zip(own, detected, strict=True)
            ]
        return evaluated
