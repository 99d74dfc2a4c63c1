"""The CLIP detector: names the object or style of each image and scores how well the image fits its prompt.

Its CLIP is not part of the model under test and is never used to make training pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.content import Question, questions
from vce_ray.evaluation.detectors.base import NOTHING, Detector
from vce_ray.evaluation.judge import judge_folder
from vce_ray.pairs.refine import refine
from vce_ray.run_config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor


class ClipDetector(Detector):
    """Zero-shot classification and prompt similarity by a CLIP in open_clip's format.

    label: the best of the concept's labels, by cosine; for objects, 'nothing' is a further choice.
    seen: whether the label is one of the concept's names.
    something: whether the image shows any object.
    confidence: probability of the object that fits best, in 0..1, 'nothing' being one of the choices.
    found: for each slot of the concept's templates the value that fits best; of two objects at once, the two best.
    score: cosine of image and prompt, in -1..1.
    refined_score: cosine of image and the prompt without the concept; null if nothing is left of the prompt.
    embedding: the judge's unit embedding of the image.
    """

    name = "clip"
    columns = pa.schema(
        {
            "label": pa.string(),
            "seen": pa.bool_(),
            "something": pa.bool_(),
            "confidence": pa.float64(),
            "found": pa.map_(pa.string(), pa.list_(pa.string())),
            "score": pa.float64(),
            "refined_score": pa.float64(),
            "embedding": pa.list_(pa.float16()),
        }.items()
    )

    def __init__(self, config: RunConfig):
        from vce_ray.evaluation.clip_model import ClipModel

        self.model = ClipModel(judge_folder(config.base, config.evaluation.judge))

    def encode(self, images_BHWC: np.ndarray, prompts: Sequence[str]) -> tuple[Tensor, np.ndarray, Sequence[str]]:
        """Return the embeddings, float32 [B, E], the cosines with the prompts, float32 [B], and the prompts."""
        embeddings_BE = self.model.encode_images(images_BHWC)
        return embeddings_BE, self.model.prompt_scores(embeddings_BE, prompts), prompts

    def detect(self, encoded: Any, indices: Sequence[int], concept: Concept) -> list[Row]:
        """Classify the images at `indices` among the labels of a concept."""
        embeddings_BE, scores_B, prompts = encoded
        own_NE = embeddings_BE[list(indices)]
        labels = self.model.best_labels(own_NE, concept.labels, concept.kind)
        # The labels of a style are styles, so whether any object is seen takes a second question.
        objects = concept.slots["object"] if concept.kind == "style" else concept.labels
        object_labels = self.model.sure_labels(own_NE, objects, "object")
        found = {question.slot: self._best_choices(own_NE, question) for question in questions(concept)}
        refined = self._refined_scores(own_NE, [prompts[index] for index in indices], concept)
        return [
            {
                "label": label,
                "seen": label in concept.names,
                "something": object_label != NOTHING,
                "confidence": confidence,
                "found": {slot: values[row] for slot, values in found.items()},
                "score": float(scores_B[index]),
                "refined_score": refined[row],
                "embedding": embedding,
            }
            for row, (index, label, (object_label, confidence), embedding) in enumerate(
                zip(indices, labels, object_labels, own_NE.tolist(), strict=True)
            )
        ]

    def _best_choices(self, embeddings_NE: Tensor, question: Question) -> list[list[str]]:
        """Return the choices that each image shows, best first."""
        _, probabilities_NL = self.model.classify(embeddings_NE, question.texts)
        best_NK = (-probabilities_NL).argsort(axis=1, kind="stable")[:, : question.at_once]
        return [[question.choices[choice] for choice in row] for row in best_NK]

    def _refined_scores(self, embeddings_NE: Tensor, prompts: Sequence[str], concept: Concept) -> list[float | None]:
        """Return the cosine of each image with its prompt without the concept; None if nothing is left of that."""
        refined = [refine(prompt, concept) for prompt in prompts]
        # an empty text has an embedding too, so every row is scored and those of empty texts are left out
        scores = self.model.prompt_scores(embeddings_NE, refined)
        return [float(score) if text else None for score, text in zip(scores, refined, strict=True)]
