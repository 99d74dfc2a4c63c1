"""Vision models as judges: chat completions endpoints that are asked whether an image shows a concept.

A model that does not answer with yes or no has not answered: `seen` is None, and the verdict counts the image as seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.dataflow.rows import Row
from vce_ray.env import JUDGE_TOKEN
from vce_ray.errors import CaptionerError
from vce_ray.evaluation.detectors.base import ANSWERS, Detector, numbered
from vce_ray.models.png import to_png
from vce_ray.pairs.answers import Caption, caption_question
from vce_ray.pairs.captioner import RED_SQUARE, parse_captioner
from vce_ray.pairs.endpoint import Endpoint
from vce_ray.run_config import RunConfig

ONE_WORD = "Answer with one word, yes or no."
TEST_QUESTION = "Does this image show a red square?"
"""What an endpoint is asked about RED_SQUARE before a run starts."""
_ANSWER = re.compile(r"[\s\"'`*_(]*(yes|no)[\s\"'`*_).!,]*", re.IGNORECASE)


class EndpointJudge(Endpoint):
    """Asks a vision model behind an endpoint yes-or-no questions about images."""

    role = "judge"
    token_variable = JUDGE_TOKEN

    def sees(self, images: Sequence[bytes], question: str) -> list[bool | None]:
        """Return the answer about each image (PNG bytes), in order; None if it is neither yes nor no.

        Raises:
            CaptionerError: like `ask`.
        """
        return [
            yes_or_no(answer)
            for answer in self.ask([caption_question(image, f"{question} {ONE_WORD}") for image in images])
        ]


class VisionDetector(Detector):
    """vision: the answer of each endpoint."""

    name = "vision"
    columns = pa.schema({"vision": ANSWERS}.items())

    def __init__(self, config: RunConfig):
        self.judges = [open_judge(name) for name in config.evaluation.endpoints]
        self.names = numbered([judge.model for judge in self.judges])

    @classmethod
    def applies(cls, config: RunConfig, concept: Concept) -> bool:
        """Return whether the run names an endpoint as a judge."""
        return bool(config.evaluation.endpoints)

    def encode(self, images_BHWC: np.ndarray, prompts: Sequence[str]) -> list[bytes]:
        """Return the images as PNG: what is asked about them depends on the concept."""
        return [to_png(image) for image in images_BHWC]

    def detect(self, encoded: Any, indices: Sequence[int], concept: Concept) -> list[Row]:
        """Ask every judge about the images at `indices`, about each once."""
        distinct, question = sorted(set(indices)), question_about(concept)
        answers: dict[int, list[Row]] = {index: [] for index in distinct}
        for name, judge in zip(self.names, self.judges, strict=True):
            for index, seen in zip(distinct, judge.sees([encoded[index] for index in distinct], question), strict=True):
                answers[index].append({"judge": name, "rule": f"says yes to “{question}”", "seen": seen, "score": None})
        return [{"vision": answers[index]} for index in indices]


def question_about(concept: Concept) -> str:
    """Return the question whether an image shows a concept: its own, or one that lists its names."""
    if concept.question:
        return concept.question
    if concept.kind == "style":
        return f"Is this image in the style of {' or '.join(concept.names)}?"
    return f"Does this image show {' or '.join(fix_articles(f'a {name}') for name in concept.names)}?"


def yes_or_no(answer: Caption) -> bool | None:
    """Return an answer of one word, yes or no, in any quotes or emphasis and with a full stop or not; else None."""
    found = None if answer.error else _ANSWER.fullmatch(answer.answer)
    return None if found is None else found.group(1).lower() == "yes"


def open_judge(name: str, deadline_s: float | None = None) -> EndpointJudge:
    """Create the judge of this name, https://host/v1#model. Raises UserError if the name is invalid."""
    ref = parse_captioner(name, "judge")
    return EndpointJudge(ref.url, ref.model, deadline_s)


def try_judge(name: str, deadline_s: float | None = None) -> str:
    """Ask an endpoint whether it sees a red square in one.

    Returns:
        In a few words, what it answered.

    Raises:
        CaptionerError: it gives no answer, refuses the token, does not have the model, or does not say yes.
    """
    judge = open_judge(name, deadline_s)
    (answer,) = judge.ask([caption_question(to_png(RED_SQUARE), f"{TEST_QUESTION} {ONE_WORD}")])
    if not yes_or_no(answer):
        said = " ".join((answer.error or answer.answer).split())[:100]
        raise CaptionerError(
            f"judge {judge.url} was asked about a red square whether it shows one, and did not say yes ({said!r})",
            "give a model that reads images and answers with yes or no",
        )
    return f"{judge.model} sees a red square"
