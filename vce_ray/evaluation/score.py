"""Draws evaluation prompts before and after, and has the judge say what is on each image. Knows no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vce_ray.evaluation.judge import NOTHING, Judge
from vce_ray.ids import stable_id
from vce_ray.models.base import ImageModel
from vce_ray.models.load import base_model, judge_folder, load_model
from vce_ray.pairs.generate import draw_once
from vce_ray.pairs.images import to_png
from vce_ray.pairs.rows import Outcome, Row
from vce_ray.run import Task


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
        judged: list[Row] = []
        if self.arm == "before":
            drawn = list(draw_once(base_model(self.base), rows, self.sampling))
            pictures = [(row, image) for row, _, image in drawn]
            for name in dict.fromkeys(row["run"] for row in rows):
                judged += self._judge(name, [(row, image) for row, image in pictures if row["run"] == name])
            return judged, []
        for name in dict.fromkeys(row["run"] for row in rows):
            drawn = draw_once(self._trained(name), [row for row in rows if row["run"] == name], self.sampling)
            judged += self._judge(name, [(row, image) for row, _, image in drawn])
        return judged, []

    def _trained(self, name: str) -> ImageModel:
        """What a run made of the base; the latest one is remembered."""
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # freed before the next one is loaded
            with tempfile.TemporaryDirectory() as folder:
                adapter = self.tasks[name].store.fetch("adapter", Path(folder) / "adapter")
                self.loaded = name, load_model(self.base, adapter=adapter)
        return self.loaded[1]

    def _judge(self, name: str, pictures: list[tuple[Row, np.ndarray]]) -> list[Row]:
        concept = self.tasks[name].concept
        images = np.stack([image for _, image in pictures])
        seen_BE = self.judge.look(images)
        labels = self.judge.name_labels(seen_BE, concept.labels, concept.kind)
        objects = concept.slots["object"] if concept.kind == "style" else concept.labels
        seen_objects = self.judge.name_labels(seen_BE, objects, "object")
        scores = self.judge.score(seen_BE, [row["prompt"] for row, _ in pictures])
        return [
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
                "score": float(score),
                "image": to_png(image),
            }
            for (row, image), label, seen_object, score in zip(pictures, labels, seen_objects, scores, strict=True)
        ]
