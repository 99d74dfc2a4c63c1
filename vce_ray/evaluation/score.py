"""Draws evaluation prompts before and after, and has the judge say what is on each image. Knows no Ray."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vce_ray.concept import Concept
from vce_ray.config import RunConfig
from vce_ray.evaluation.judge import NOTHING, Judge
from vce_ray.ids import stable_id
from vce_ray.models.load import judge_folder, load_model
from vce_ray.pairs.generate import Outcome, Row
from vce_ray.pairs.images import to_png
from vce_ray.sampling import draw
from vce_ray.store import Store


class Score:
    """Evaluation prompts -> judged images of one arm: drawn by the base ('before') or by what the run made of it."""

    def __init__(self, run: RunConfig, concept: Concept, store: Store, arm: str):
        self.run, self.concept, self.arm = run, concept, arm
        self.judge = Judge(judge_folder(run.base, run.evaluation.judge))
        self.objects = concept.slots["object"] if concept.kind == "style" else concept.labels
        if arm == "before":
            self.model = load_model(run.base)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.model = load_model(run.base, adapter=store.fetch("adapter", Path(folder) / "adapter"))

    def __call__(self, rows: list[Row]) -> Outcome:
        prompts = [row["prompt"] for row in rows]
        tokens = draw(self.model, prompts, [row["seed"] for row in rows], self.run.sampling)
        images = self.model.decode_pixels(tokens)
        labels = self.judge.name_labels(images, self.concept.labels, self.concept.kind)
        objects = self.judge.name_labels(images, self.objects, "object")
        scores = self.judge.score(images, prompts)
        judged = [
            {
                "image_id": stable_id(self.arm, row["prompt_id"]),
                "arm": self.arm,
                "group": row["kind"],
                "prompt": row["prompt"],
                "template_held_out": row["held_out"],
                "name": row["name"],
                "seed": row["seed"],
                "label": label,
                "seen": label in self.concept.names,
                "something": seen_object != NOTHING,
                "score": float(score),
                "image": to_png(image),
            }
            for row, image, label, seen_object, score in zip(rows, images, labels, objects, scores, strict=True)
        ]
        return judged, []
