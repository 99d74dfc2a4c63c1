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
from vce_ray.evaluation.detectors.base import NOTHING, Detector
from vce_ray.evaluation.judge import judge_folder
from vce_ray.run_config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor


class ClipDetector(Detector):
    """Zero-shot classification and prompt similarity by a CLIP in open_clip's format.

    label: the best of the concept's labels, by cosine; for objects, 'nothing' is a further choice.
    seen: whether the label is one of the concept's names.
    something: whether the image shows any object.
    score: cosine of image and prompt, in -1..1.
    """

    name = "clip"
    columns = pa.schema(
        {"label": pa.string(), "seen": pa.bool_(), "something": pa.bool_(), "score": pa.float64()}.items()
    )

    def __init__(self, config: RunConfig):
        from vce_ray.evaluation.clip_model import ClipModel

        self.model = ClipModel(judge_folder(config.base, config.evaluation.judge))

    def encode(self, images_BHWC: np.ndarray, prompts: Sequence[str]) -> tuple[Tensor, np.ndarray]:
        """Return the embeddings, float32 [B, E], and the cosines with the prompts, float32 [B]."""
        embeddings_BE = self.model.encode_images(images_BHWC)
        return embeddings_BE, self.model.prompt_scores(embeddings_BE, prompts)

    def detect(self, encoded: Any, indices: Sequence[int], concept: Concept) -> list[Row]:
        """Classify the images at `indices` among the labels of a concept."""
        embeddings_BE, scores_B = encoded
        own_NE = embeddings_BE[list(indices)]
        labels = self.model.best_labels(own_NE, concept.labels, concept.kind)
        # The labels of a style are styles, so whether any object is seen takes a second question.
        objects = concept.slots["object"] if concept.kind == "style" else concept.labels
        object_labels = self.model.best_labels(own_NE, objects, "object")
        return [
            {
                "label": label,
                "seen": label in concept.names,
                "something": object_label != NOTHING,
                "score": float(scores_B[index]),
            }
            for index, label, object_label in zip(indices, labels, object_labels, strict=True)
        ]
