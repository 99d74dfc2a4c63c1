"""Captions unsafe images and takes the concept out of the captions."""

from __future__ import annotations

from collections.abc import Mapping

from vce_ray.concept import Concept
from vce_ray.models.load import base_model
from vce_ray.pairs.images import from_png
from vce_ray.pairs.refine import refine
from vce_ray.pairs.rows import Outcome, Row, reject

CAPTION_BATCH = 32


class Describe:
    """Unsafe pictures -> captions and refined captions.

    Rejected are: a picture whose caption does not name the concept (it shows no contrast to learn from), an
    empty caption, and a caption of which nothing is left without the concept.
    """

    def __init__(self, reader: str, concepts: Mapping[str, Concept]):
        self.reader, self.concepts = base_model(reader), concepts

    def __call__(self, rows: list[Row]) -> Outcome:
        captions: list[str] = []
        for start in range(0, len(rows), CAPTION_BATCH):
            captions += self.reader.caption(from_png(row["image"] for row in rows[start : start + CAPTION_BATCH]))
        described, rejects = [], []
        for row, caption in zip(rows, captions, strict=True):
            refined = refine(caption, self.concepts[row["run"]]) if caption else None
            if refined is None:
                reason = "empty caption"
            elif not refined.removed_terms:
                reason = "concept not in unsafe image"
            elif refined.nothing_left:
                reason = "nothing left of the caption"
            else:
                described.append(
                    {
                        **{key: row[key] for key in ("run", "sample_id", "prompt", "tokens")},
                        "caption": caption,
                        "refined_caption": refined.text,
                        "removed_terms": list(refined.removed_terms),
                    }
                )
                continue
            rejects.append(reject(row, "captions", reason, caption))
        return described, rejects
