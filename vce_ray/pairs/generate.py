"""Draws the images of a run: those its prompts ask for, and safe ones of the same content.

Plain callables from rows to (rows, rejects); `fanout.py` runs them in Ray actors.
"""

from __future__ import annotations

from typing import Any

from vce_ray.concept import Concept
from vce_ray.config import SamplingConfig
from vce_ray.ids import stable_id
from vce_ray.models.load import load_model
from vce_ray.pairs.images import to_png
from vce_ray.pairs.prompts import sampling_seed
from vce_ray.sampling import draw

Row = dict[str, Any]
Outcome = tuple[list[Row], list[Row]]
"""Rows that came out well, and rejects (reject() makes them)."""


def reject(row_id: str, stage: str, reason: str, detail: str, attempt: int = 1) -> Row:
    """A row of `rejects/`: which row failed where, why, and after how many attempts."""
    return {"row_id": row_id, "stage": stage, "reason": reason, "detail": detail, "attempt": attempt}


def sample_id(revision: str, prompt: str, seed: int, sampling: SamplingConfig) -> str:
    """The id of a picture: a hash of all that determines it (the batch size does not)."""
    return stable_id(revision, prompt, seed, sampling.model_dump(mode="json", exclude={"batch_size"}))


class DrawUnsafe:
    """Prompts -> pictures, of the concept and of what must be kept, as the base draws them."""

    def __init__(self, base: str, sampling: SamplingConfig):
        self.model, self.sampling = load_model(base), sampling

    def __call__(self, rows: list[Row]) -> Outcome:
        tokens = draw(self.model, [r["prompt"] for r in rows], [r["seed"] for r in rows], self.sampling)
        images = self.model.decode_pixels(tokens)
        drawn = [
            {
                "sample_id": sample_id(self.model.revision, row["prompt"], row["seed"], self.sampling),
                **{key: row[key] for key in ("prompt_id", "prompt", "kind", "name", "seed")},
                "tokens": row_tokens,
                "image": to_png(image),
            }
            for row, row_tokens, image in zip(rows, tokens.tolist(), images, strict=True)
        ]
        return drawn, []


class DrawSafe:
    """Refined captions -> safe pictures of the same content.

    Each picture is captioned again, and one in which the caption still names the concept is drawn anew with
    the next seed, `attempts` times at most. `reader`, the base itself where it can, describes; the judge that
    scores a run is another model and has no say here.
    """

    def __init__(self, base: str, reader: str, sampling: SamplingConfig, concept: Concept, attempts: int):
        self.model, self.sampling, self.concept, self.attempts = load_model(base), sampling, concept, attempts
        self.reader = self.model if reader == base else load_model(reader)

    def __call__(self, rows: list[Row]) -> Outcome:
        drawn: list[Row] = []
        open_rows = list(rows)
        last_check: dict[str, str] = {}
        for attempt in range(1, self.attempts + 1):
            if not open_rows:
                break
            seeds = [sampling_seed("safe", row["sample_id"], attempt) for row in open_rows]
            prompts = [row["refined_caption"] for row in open_rows]
            tokens = draw(self.model, prompts, seeds, self.sampling)
            images = self.model.decode_pixels(tokens)
            still_open = []
            for row, seed, row_tokens, image, check in zip(
                open_rows, seeds, tokens.tolist(), images, self.reader.caption(images), strict=True
            ):
                last_check[row["sample_id"]] = check
                if self.concept.mentions(check):
                    still_open.append(row)
                    continue
                drawn.append(
                    {
                        "sample_id": sample_id(self.model.revision, row["refined_caption"], seed, self.sampling),
                        "source_id": row["sample_id"],
                        "prompt": row["refined_caption"],
                        "seed": seed,
                        "tokens": row_tokens,
                        "image": to_png(image),
                        "check_caption": check,
                        "attempt": attempt,
                    }
                )
            open_rows = still_open
        rejects = [
            reject(row["sample_id"], "safe", "concept in safe image", last_check[row["sample_id"]], self.attempts)
            for row in open_rows
        ]
        return drawn, rejects
