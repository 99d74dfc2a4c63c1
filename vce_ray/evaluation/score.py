"""Draws evaluation prompts before and after, and has the judge say what is on each image. Knows no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vce_ray.dataflow.ids import stable_id
from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.dataflow.task import Task
from vce_ray.evaluation.judge import NOTHING, Judge
from vce_ray.models.base import ImageModel
from vce_ray.models.load import base_model, judge_folder, load_model
from vce_ray.pairs.generate import draw_once
from vce_ray.pairs.images import to_png


class Score:
    """Evaluation prompts -> judged images of one arm: drawn by the base ('before') or by what a run made of it.

    Rows of several runs may come; what more than one of them asks of the base is drawn once.
    """

    def __init__(self, tasks: Mapping[str, Task], arm: str):
        self.tasks, self.arm = tasks, arm
        run = next(iter(tasks.values())).config
        self.base, self.sampling = run.base, run.sampling
        self.judge = Judge(judge_folder(run.base, run.evaluation.judge))
        self.loaded: tuple[str, ImageModel] | None = None

    def __call__(self, rows: list[Row]) -> Outcome:
        if self.arm == "before":
            return self._judged(base_model(self.base), rows), []
        judged: list[Row] = []
        for name in dict.fromkeys(row["run"] for row in rows):
            judged += self._judged(self._trained(name), [row for row in rows if row["run"] == name])
        return judged, []

    def _trained(self, name: str) -> ImageModel:
        """What a run made of the base; the latest one is remembered."""
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # freed before the next one is loaded
            with tempfile.TemporaryDirectory() as folder:
                adapter = self.tasks[name].store.fetch("adapter", Path(folder) / "adapter")
                self.loaded = name, load_model(self.base, adapter=adapter)
        return self.loaded[1]

    def _judged(self, model: ImageModel, rows: list[Row]) -> list[Row]:
        """What a model draws for rows. The judge looks once at each picture, and answers each run that asks for it."""
        drawn = list(draw_once(model, rows, self.sampling))
        seen_BE = self.judge.look(np.stack([image for _, _, image in drawn]))
        scores = self.judge.score(seen_BE, [asking[0]["prompt"] for asking, _, _ in drawn])
        pngs = [to_png(image) for _, _, image in drawn]
        judged: list[Row] = []
        for name in dict.fromkeys(row["run"] for row in rows):
            mine = [(row, place) for place, (asking, _, _) in enumerate(drawn) for row in asking if row["run"] == name]
            concept, mine_BE = self.tasks[name].concept, seen_BE[[place for _, place in mine]]
            labels = self.judge.name_labels(mine_BE, concept.labels, concept.kind)
            objects = concept.slots["object"] if concept.kind == "style" else concept.labels
            seen_objects = self.judge.name_labels(mine_BE, objects, "object")
            judged += [
                {
                    "run": name,
                    "image_id": stable_id(self.arm, row["prompt_id"]),
                    "prompt_id": row["prompt_id"],
                    "arm": self.arm,
                    "group": row["kind"],
                    "prompt": row["prompt"],
                    "template_held_out": row["held_out"],
                    "name": row["name"],
                    "seed": row["seed"],
                    "label": label,
                    "seen": label in concept.names,
                    "something": seen_object != NOTHING,
                    "score": float(scores[place]),
                    "image": pngs[place],
                }
                for (row, place), label, seen_object in zip(mine, labels, seen_objects, strict=True)
            ]
        return judged
