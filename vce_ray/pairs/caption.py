"""Captions unsafe images and removes the concept from the captions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import CAPTIONER_FAILED, Outcome, Row, reject
from vce_ray.models.words import vocabulary_of
from vce_ray.pairs.answers import Caption, clean, question_for
from vce_ray.pairs.captioner import open_captioner, open_refiner
from vce_ray.pairs.grammar import fault
from vce_ray.pairs.refine import is_gutted, refine

log = logging.getLogger(__name__)

UNUSABLE = "refined caption is no prompt"
"""Reason of a reject. Its detail begins with what is wrong, and the refined caption."""


class Describe:
    """Step `captions`: unsafe images -> captions and refined captions.

    A row is rejected, independently of the others and with its own reason, if

    - the captioner's answer is unusable (answers.py),
    - no sentence of the answer mentions the concept, so that the image gives no contrast to learn from,
    - nothing is left of the caption without the concept,
    - the refined caption still mentions the concept, or
    - it is no prompt: not grammatical (grammar.py), without most of the caption, or with a word that the base model
      does not know.

    Args:
        captioner: name of the captioner; None if the rows already contain its answers (ANSWER).
        concepts: concept of each run.
        refiner: name of the refiner that rewrites captions before the rules of refine.py are applied. None applies the
            rules alone, as does an unusable answer of the refiner.
        base: base model that draws the refined captions. If its vocabulary is closed, a caption into which refining has
            brought a word that it does not know is rejected.
    """

    def __init__(
        self,
        captioner: str | None,
        concepts: Mapping[str, Concept],
        refiner: str | None = None,
        base: str | None = None,
    ):
        self.vocabulary = vocabulary_of(base) if base else None
        self.captioner, self.concepts = open_captioner(captioner) if captioner else None, concepts
        self.refiner = open_refiner(refiner) if refiner else None

    def __call__(self, rows: list[Row]) -> Outcome:
        if self.captioner is None:
            captions = [answered(row) for row in rows]
        else:
            questions = [question_for(self.concepts[row["run"]].kind) for row in rows]
            captions = self.captioner.caption([row["image"] for row in rows], questions)
        concepts = [self.concepts[row["run"]] for row in rows]
        mentioned = [
            () if caption.error else concept.mentions(caption.answer)
            for caption, concept in zip(captions, concepts, strict=True)
        ]
        texts = self._rewrite(captions, concepts, mentioned)
        described, rejects = [], []
        for row, caption, concept, removed, text in zip(rows, captions, concepts, mentioned, texts, strict=True):
            refined, problem = refine(text, concept) if removed else "", ""
            if caption.error:
                reason = caption.error
            elif not removed:
                reason = "concept not in unsafe image"
            elif not refined:
                reason = "nothing left of the caption"
            elif concept.mentions(refined):
                reason = "concept still in refined caption"
            elif problem := self._problem(refined, caption):
                reason = UNUSABLE
            else:
                described.append(
                    {
                        **{key: row[key] for key in ("run", "sample_id", "prompt", "tokens")},
                        "caption": caption.text,
                        "refined_caption": refined,
                        "removed_terms": list(removed),
                    }
                )
                continue
            detail = f"{problem}: {refined} ({caption.answer})" if reason == UNUSABLE else caption.answer
            rejects.append(reject(row, "captions", reason, detail))
        return described, rejects

    def _problem(self, refined: str, caption: Caption) -> str:
        """Return in a few words why a refined caption cannot be a prompt; '' if it can."""
        if problem := fault(refined):
            return problem
        if is_gutted(caption.text, refined):
            return "most of the caption is lost"
        if self.vocabulary is not None:
            known = set(self.vocabulary.unknown(caption.text))  # of another captioner, whose words are only ignored
            new = [word for word in self.vocabulary.unknown(refined) if word not in known]
            return f"the base does not know '{new[0]}'" if new else ""
        return ""

    def _rewrite(
        self, captions: Sequence[Caption], concepts: Sequence[Concept], mentioned: Sequence[tuple[str, ...]]
    ) -> list[str]:
        """Return the captions, with those that mention their concept rewritten by the refiner if there is one."""
        texts = [caption.text for caption in captions]
        if self.refiner is not None:
            indices = [i for i, terms in enumerate(mentioned) if terms and concepts[i].mentions(texts[i])]
            answers = self.refiner.rewrite([(texts[i], concepts[i]) for i in indices])
            for i, rewritten in zip(indices, answers, strict=True):
                texts[i] = rewritten.text or texts[i]
                if rewritten.error:
                    log.warning("refiner unusable, using rules only: %s (%s)", rewritten.error, rewritten.answer[:200])
        return texts


ANSWER = ("answer", "cut_off", "failure")
"""Columns of a row that contains a captioner's answer: its text, whether it was truncated, the error if it failed."""


def answered(row: Row) -> Caption:
    """Return the caption of a row that contains a captioner's answer."""
    if row["failure"]:
        return Caption("", row["failure"], CAPTIONER_FAILED)
    return clean(row["answer"], row["cut_off"])
