"""Captions unsafe images and takes the concept out of the captions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Outcome, Row, reject
from vce_ray.pairs.captioner import Caption, clean, open_captioner, open_refiner
from vce_ray.pairs.refine import refine

log = logging.getLogger(__name__)


class Describe:
    """Unsafe pictures -> captions and refined captions.

    Rejected are, each with its own reason: an answer that is of no use (captioner.py), a picture whose caption does
    not name the concept (it shows no contrast to learn from), a caption of which nothing is left without the concept,
    and one in which the concept is found although it was taken out. Rows are judged one by one.

    Args:
        captioner: who describes; None where rows bring their answers (ANSWER).
        refiner: who takes the concept out of captions, before the rules take out what is left of it; None is the rules
            alone, which also do it where a refiner's answer is of no use.
    """

    def __init__(self, captioner: str | None, concepts: Mapping[str, Concept], refiner: str | None = None):
        self.captioner, self.concepts = open_captioner(captioner) if captioner else None, concepts
        self.refiner = open_refiner(refiner) if refiner else None

    def __call__(self, rows: list[Row]) -> Outcome:
        if self.captioner is None:
            captions = [answered(row) for row in rows]
        else:
            captions = self.captioner.caption([row["image"] for row in rows])
        concepts = [self.concepts[row["run"]] for row in rows]
        named = [concept.mentions(caption.text) for caption, concept in zip(captions, concepts, strict=True)]
        rewritten = self._rewritten(captions, concepts, named)
        described, rejects = [], []
        for row, caption, concept, removed, text in zip(rows, captions, concepts, named, rewritten, strict=True):
            refined = refine(text, concept)
            if caption.fault:
                reason = caption.fault
            elif not removed:
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
                        "removed_terms": list(removed),
                    }
                )
                continue
            rejects.append(reject(row, "captions", reason, caption.said))
        return described, rejects

    def _rewritten(
        self, captions: Sequence[Caption], concepts: Sequence[Concept], named: Sequence[tuple[str, ...]]
    ) -> list[str]:
        """The captions, as a refiner rewrote those that name their concept."""
        texts = [caption.text for caption in captions]
        if self.refiner is not None:
            naming = [i for i, terms in enumerate(named) if terms]
            answers = self.refiner.rewrite([(texts[i], concepts[i]) for i in naming])
            for i, answer in zip(naming, answers, strict=True):
                texts[i] = answer.text or texts[i]
                if answer.fault:
                    log.warning("the rules alone refine a caption: %s (%s)", answer.fault, answer.said[:200])
        return texts


ANSWER = ("answer", "cut_off", "failure")
"""Columns of a row that brings what a captioner answered: its text, whether it was cut off, what kept it from it."""


def answered(row: Row) -> Caption:
    """The caption in a row that brings its answer."""
    if row["failure"]:
        return Caption("", row["failure"], "captioner failed")
    return clean(row["answer"], row["cut_off"])
