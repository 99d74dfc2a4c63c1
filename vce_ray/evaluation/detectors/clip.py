"""The CLIP detector: names the object or style of each image and scores how well the image fits its prompt.

Its CLIP is not part of the model under test and is never used to make training pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.content import Question, questions
from vce_ray.evaluation.detectors.base import ANSWERS, NOTHING, Detector, numbered
from vce_ray.evaluation.judge import judge_folder, judge_name
from vce_ray.pairs.refine import refine
from vce_ray.run_config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from vce_ray.evaluation.clip_model import ClipModel

THRESHOLD = 0.5
"""Least probability of a concept that is detected, against images that do not show it."""
NAMES = "finds one of the concept's names closest, of all labels"
DETECTS = f"finds the concept with a probability of at least {THRESHOLD}"


@dataclass(frozen=True)
class Encoded:
    """What the models say of a batch of B images."""

    embeddings: list[Tensor]
    """Each model's, float32 [B, E]."""
    scores_B: np.ndarray
    """The first model's cosines with the prompts, float32."""
    prompts: Sequence[str]


class ClipDetector(Detector):
    """Zero-shot classification and prompt similarity by CLIPs in open_clip's format.

    All columns but the last come from the run's first CLIP. A concept with `seen_texts` is detected: its names are
    labels of the images in which it is found, and of no others. Any other concept is named, by the closest label.

    label: the best of the concept's labels, by cosine; for objects, 'nothing' is a further choice.
    seen: whether the label is one of the concept's names.
    something: whether the image shows any object.
    confidence: probability of the object that fits best, in 0..1, 'nothing' being one of the choices.
    found: for each slot of the concept's templates the value that fits best; of two objects at once, the two best.
    score: cosine of image and prompt, in -1..1.
    refined_score: cosine of image and the prompt without the concept; null if nothing is left of the prompt.
    embedding: the judge's unit embedding of the image.
    clip: whether each of the run's CLIPs sees the concept; the score is its probability against all that it is not.
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
            "clip": ANSWERS,
        }.items()
    )

    def __init__(self, config: RunConfig):
        from vce_ray.evaluation.clip_model import clip_model

        clips = config.evaluation.clips(config.base)
        self.names = numbered([judge_name(ref) for ref in clips])
        self.models = [clip_model(judge_folder(ref)) for ref in clips]
        self.model = self.models[0]

    def encode(self, images_BHWC: np.ndarray, prompts: Sequence[str]) -> Encoded:
        """Run each model on the images, and the first one on the prompts."""
        embeddings = [model.encode_images(images_BHWC) for model in self.models]
        return Encoded(embeddings, self.model.prompt_scores(embeddings[0], prompts), prompts)

    def detect(self, encoded: Encoded, indices: Sequence[int], concept: Concept) -> list[Row]:
        """Classify the images at `indices` among the labels of a concept."""
        own = [embeddings_BE[list(indices)] for embeddings_BE in encoded.embeddings]
        judged = [_judge(model, own_NE, concept) for model, own_NE in zip(self.models, own, strict=True)]
        rule = DETECTS if concept.seen_texts else NAMES
        # The labels of a style are styles, so whether any object is seen takes a second question.
        if concept.kind == "style":
            object_labels = self.model.sure_labels(own[0], concept.slots["object"], "object")
        else:
            object_labels = self.model.sure_labels(own[0], concept.labels, "object", template=concept.label_template)
        found = {question.slot: self._best_choices(own[0], question) for question in questions(concept)}
        refined = self._refined_scores(own[0], [encoded.prompts[index] for index in indices], concept)
        return [
            {
                "label": judged[0][0][row],
                "seen": judged[0][0][row] in concept.names,
                "something": object_labels[row][0] != NOTHING,
                "confidence": object_labels[row][1],
                "found": {slot: values[row] for slot, values in found.items()},
                "score": float(encoded.scores_B[index]),
                "refined_score": refined[row],
                "embedding": own[0][row].tolist(),
                "clip": [
                    {"judge": name, "rule": rule, "seen": labels[row] in concept.names, "score": float(presence_N[row])}
                    for name, (labels, presence_N) in zip(self.names, judged, strict=True)
                ],
            }
            for row, index in enumerate(indices)
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


def _judge(model: ClipModel, embeddings_NE: Tensor, concept: Concept) -> tuple[list[str], np.ndarray]:
    """Return the label of each image, and the probability that it shows the concept, float32 [N]."""
    from vce_ray.evaluation.clip_model import label_text

    kind, template = concept.kind, concept.label_template
    others = tuple(label for label in concept.labels if label not in concept.names)
    if not concept.seen_texts:
        rest = others if kind == "style" else (*others, NOTHING)
        own_texts, other_texts = (
            [label_text(label, kind, template) for label in labels] for labels in (concept.names, rest)
        )
        labels = model.best_labels(embeddings_NE, concept.labels, kind, template=template)
        return labels, model.presence(embeddings_NE, own_texts, other_texts)
    presence_N = model.presence(embeddings_NE, concept.seen_texts, concept.unseen_texts)
    if_seen = model.best_labels(embeddings_NE, concept.names, kind, or_nothing=False, template=template)
    if_not = model.best_labels(embeddings_NE, (*others, NOTHING), kind, or_nothing=False, template=template)
    pairs = zip(presence_N, if_seen, if_not, strict=True)
    return [label if presence >= THRESHOLD else other for presence, label, other in pairs], presence_N
