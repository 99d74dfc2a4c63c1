"""Draws the images of a run: those its prompts ask for, and safe ones of the same content.

Plain callables from rows to (rows, rejects), each with the run that it belongs to; `fanout.py` runs them in Ray actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vce_ray.concepts.concept import Concept
from vce_ray.config import SamplingConfig
from vce_ray.dataflow.ids import stable_id
from vce_ray.dataflow.rows import Outcome, Row, reject
from vce_ray.models.load import base_model
from vce_ray.pairs.captioner import Caption, open_captioner
from vce_ray.pairs.images import to_png
from vce_ray.pairs.prompts import sampling_seed
from vce_ray.sampling import draw

if TYPE_CHECKING:
    import numpy as np

    from vce_ray.models.base import ImageModel


def sample_id(revision: str, prompt: str, seed: int, sampling: SamplingConfig) -> str:
    """The id of a picture: a hash of all that determines it (the batch size does not)."""
    return stable_id(revision, prompt, seed, sampling.determining())


def draw_once(
    model: ImageModel, rows: list[Row], sampling: SamplingConfig
) -> Iterator[tuple[list[Row], list[int], np.ndarray]]:
    """Each picture that rows ask for, by prompt and seed: the rows that share it, its tokens and its pixels."""
    asked: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        asked.setdefault((row["prompt"], row["seed"]), []).append(row)
    tokens = draw(model, [prompt for prompt, _ in asked], [seed for _, seed in asked], sampling)
    yield from zip(asked.values(), tokens.tolist(), model.decode_pixels(tokens), strict=True)


class DrawUnsafe:
    """Prompts -> pictures, of the concept and of what must be kept, as the base draws them."""

    def __init__(self, base: str, sampling: SamplingConfig):
        self.model, self.sampling = base_model(base), sampling

    def __call__(self, rows: list[Row]) -> Outcome:
        drawn: list[Row] = []
        for asking, tokens, image in draw_once(self.model, rows, self.sampling):
            prompt, seed = asking[0]["prompt"], asking[0]["seed"]
            drawn_id = sample_id(self.model.revision, prompt, seed, self.sampling)
            picture = {"sample_id": drawn_id, "prompt": prompt, "seed": seed, "tokens": tokens, "image": to_png(image)}
            drawn += [{key: row[key] for key in ("run", "prompt_id", "kind", "name")} | picture for row in asking]
        return drawn, []


class DrawSafe:
    """Refined captions -> safe pictures of the same content.

    Each picture is captioned again, and one in which the caption still names the concept is drawn anew with
    the next seed, `attempts` times at most; so is one that the captioner cannot describe. All of its answer counts, not
    only its first sentence. The judge that scores a run is another model and has no say here.
    """

    def __init__(
        self, base: str, captioner: str, sampling: SamplingConfig, concepts: Mapping[str, Concept], attempts: int
    ):
        self.model, self.captioner, self.sampling = base_model(base), open_captioner(captioner), sampling
        self.concepts, self.attempts = concepts, attempts

    def __call__(self, rows: list[Row]) -> Outcome:
        drawn: list[Row] = []
        open_rows = list(rows)
        last_check: dict[str, Caption] = {}
        for attempt in range(1, self.attempts + 1):
            if not open_rows:
                break
            seeds = [sampling_seed("safe", row["sample_id"], attempt) for row in open_rows]
            prompts = [row["refined_caption"] for row in open_rows]
            tokens = draw(self.model, prompts, seeds, self.sampling)
            images = [to_png(image) for image in self.model.decode_pixels(tokens)]
            still_open = []
            for row, seed, row_tokens, image, check in zip(
                open_rows, seeds, tokens.tolist(), images, self.captioner.caption(images), strict=True
            ):
                last_check[row["sample_id"]] = check
                if check.fault or self.concepts[row["run"]].mentions(check.said):
                    still_open.append(row)
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
            open_rows = still_open
        rejects = []
        for row in open_rows:
            check = last_check[row["sample_id"]]
            reason = f"safe image unchecked: {check.fault}" if check.fault else "concept in safe image"
            rejects.append(reject(row, "safe", reason, check.said, self.attempts))
        return drawn, rejects
