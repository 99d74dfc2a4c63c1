"""Captions unsafe images and takes the concept out of the captions."""

from __future__ import annotations

from collections.abc import Mapping

from vce_ray.concept import Concept
from vce_ray.pairs.captioner import Caption, clean, open_captioner
from vce_ray.pairs.refine import refine
from vce_ray.pairs.rows import Outcome, Row, reject


class Describe:
    """Unsafe pictures -> captions and refined captions.

    Rejected are, each with its own reason: an answer that is of no use (captioner.py), a picture whose caption does
    not name the concept (it shows no contrast to learn from), a caption of which nothing is left without the concept,
    and one in which the concept is found although it was taken out. Rows are judged one by one.

    Args:
        captioner: who describes; None where rows bring their answers (ANSWER).
    """

    def __init__(self, captioner: str | None, concepts: Mapping[str, Concept]):
        self.captioner, self.concepts = open_captioner(captioner) if captioner else None, concepts

    def __call__(self, rows: list[Row]) -> Outcome:
        if self.captioner is None:
            captions = [answered(row) for row in rows]
        else:
            captions = self.captioner.caption([row["image"] for row in rows])
        described, rejects = [], []
        for row, caption in zip(rows, captions, strict=True):
            concept = self.concepts[row["run"]]
            refined = None if caption.fault else refine(caption.text, concept)
            if refined is None:
                reason = caption.fault
            elif not refined.removed_terms:
                reason = "concept not in unsafe image"
            elif refined.nothing_left:
                reason = "nothing left of the caption"
            elif concept.mentions(refined.text):
                reason = "concept still in refined caption"
            else:
                described.append(
                    {
                        **{key: row[key] for key in ("run", "sample_id", "prompt", "tokens")},
                        "caption": caption.text,
                        "refined_caption": refined.text,
                        "removed_terms": list(refined.removed_terms),
                    }
                )
                continue
            rejects.append(reject(row, "captions", reason, caption.said))
        return described, rejects


ANSWER = ("answer", "cut_off", "failure")
"""Columns of a row that brings what a captioner answered: its text, whether it was cut off, what kept it from it."""


def answered(row: Row) -> Caption:
    """The caption in a row that brings its answer."""
    if row["failure"]:
        return Caption("", row["failure"], "captioner failed")
    return clean(row["answer"], row["cut_off"])
