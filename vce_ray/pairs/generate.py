"""Draws the images of a run: those of its prompts, and safe images with the same content.

The steps are plain callables from rows to (rows, rejects). Each row names its run. dataflow/fanout.py runs them in Ray
actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vce_ray.concepts.concept import Concept
from vce_ray.config import SamplingConfig
from vce_ray.dataflow.ids import stable_id
from vce_ray.dataflow.rows import Outcome, Row, reject
from vce_ray.models.load import base_model
from vce_ray.models.png import to_png
from vce_ray.pairs.answers import Caption, question_for
from vce_ray.pairs.captioner import open_captioner
from vce_ray.pairs.prompts import sampling_seed
from vce_ray.sampling import draw

if TYPE_CHECKING:
    import numpy as np

    from vce_ray.models.base import ImageModel


def sample_id(revision: str, prompt: str, seed: int, sampling: SamplingConfig) -> str:
    """Return the id of an image: a hash of everything that determines it, which the batch size does not."""
    return stable_id(revision, prompt, seed, sampling.determining())


def draw_once(
    model: ImageModel, rows: list[Row], sampling: SamplingConfig
) -> Iterator[tuple[list[Row], list[int], np.ndarray]]:
    """Draw each distinct (prompt, seed) of the rows once, in one batch.

    Yields:
        The rows that share the image, its image tokens, and its pixels (uint8 [H, W, 3]).
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["prompt"], row["seed"]), []).append(row)
    tokens = draw(model, [prompt for prompt, _ in groups], [seed for _, seed in groups], sampling)
    yield from zip(groups.values(), tokens.tolist(), model.decode_pixels(tokens), strict=True)


class DrawUnsafe:
    """Step `unsafe`: prompts -> images of the base model, both of the concept and of what must be preserved."""

    def __init__(self, base: str, sampling: SamplingConfig):
        self.model, self.sampling = base_model(base), sampling

    def __call__(self, rows: list[Row]) -> Outcome:
        drawn: list[Row] = []
        for sharing, tokens, image in draw_once(self.model, rows, self.sampling):
            prompt, seed = sharing[0]["prompt"], sharing[0]["seed"]
            drawn_id = sample_id(self.model.revision, prompt, seed, self.sampling)
            sample = {"sample_id": drawn_id, "prompt": prompt, "seed": seed, "tokens": tokens, "image": to_png(image)}
            drawn += [{key: row[key] for key in ("run", "prompt_id", "kind", "name")} | sample for row in sharing]
        return drawn, []


class DrawSafe:
    """Step `safe`: refined captions -> safe images with the same content.

    Each image is captioned again as a check. It is redrawn with the next seed, up to `attempts` times in total, if the
    captioner's complete answer (not only its first sentence) mentions the concept, or if the answer is unusable. The
    judge that evaluates the run is a different model and takes no part in this.

    Args:
        base: base model.
        captioner: captioner that checks the images; it may be the base model.
        concepts: concept of each run.
        attempts: images drawn per row before it is rejected.
    """

    def __init__(
        self, base: str, captioner: str, sampling: SamplingConfig, concepts: Mapping[str, Concept], attempts: int
    ):
        self.model, self.captioner, self.sampling = base_model(base), open_captioner(captioner), sampling
        self.concepts, self.attempts = concepts, attempts

    def __call__(self, rows: list[Row]) -> Outcome:
        drawn: list[Row] = []
        pending = list(rows)
        last_check: dict[str, Caption] = {}
        for attempt in range(1, self.attempts + 1):
            if not pending:
                break
            seeds = [sampling_seed("safe", row["sample_id"], attempt) for row in pending]
            prompts = [row["refined_caption"] for row in pending]
            tokens = draw(self.model, prompts, seeds, self.sampling)
            images = [to_png(image) for image in self.model.decode_pixels(tokens)]
            failed = []
            questions = [question_for(self.concepts[row["run"]].kind) for row in pending]
            for row, seed, row_tokens, image, check in zip(
                pending, seeds, tokens.tolist(), images, self.captioner.caption(images, questions), strict=True
            ):
                last_check[row["sample_id"]] = check
                if check.error or self.concepts[row["run"]].mentions(check.answer):
                    failed.append(row)
                    continue
                drawn_id = sample_id(self.model.revision, row["refined_caption"], seed, self.sampling)
                drawn.append(
                    {
                        "pair_id": stable_id(row["sample_id"], drawn_id),
                        "source_id": row["sample_id"],
                        "sample_id": drawn_id,
                        **{key: row[key] for key in ("run", "prompt", "refined_caption")},
                        "seed": seed,
                        "chosen": row_tokens,
                        "rejected": row["tokens"],
                        "image": image,
                        "check_caption": check.text,
                        "attempt": attempt,
                    }
                )
            pending = failed
        rejects = []
        for row in pending:
            check = last_check[row["sample_id"]]
            reason = f"safe image unchecked: {check.error}" if check.error else "concept in safe image"
            rejects.append(reject(row, "safe", reason, check.answer, self.attempts))
        return drawn, rejects
