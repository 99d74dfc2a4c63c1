"""What else the prompts of the concept asked for: is it still drawn, now that the concept is not?

For each slot that prompts for the concept name a value of, such as style or background:

asked_<slot>_before, asked_<slot>_after: share of these images in which the judge finds the value, of all that the slot
    has.
asked_<slot>_drop: before minus after, over pairs of the same prompt and seed.

asked: {name, choices, chance, before, after, drop} of each slot, with its figures, largest drop first. `chance` is what
    blind guessing gets right.
worst_asked, worst_asked_drop: the slot that lost most, and how much; None if prompts name nothing else.
"""

from __future__ import annotations

from dataclasses import asdict

from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.content import Question, questions
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import Figure, paired_drop, share


def right(row: Row, slot: str) -> bool | None:
    """Return whether the judge finds what the prompt names for a slot; None if it names nothing."""
    asked = dict(row["asked"] or ()).get(slot)
    return None if asked is None else asked in dict(row["found"] or ()).get(slot, ())


def _measure(comparison: Comparison) -> Measured:
    figures: dict[str, Figure] = {}
    slots: list[Row] = []
    for question in questions(comparison.concept):
        before, after = (
            [found for row in rows if (found := right(row, question.slot)) is not None]
            for rows in (comparison.erase.before, comparison.erase.after)
        )
        if before:
            measured = {"before": share(before), "after": share(after), "drop": paired_drop(before, after)}
            figures |= {f"asked_{question.slot}_{name}": figure for name, figure in measured.items()}
            slots.append(_detail(question) | {name: asdict(figure) for name, figure in measured.items()})
    slots.sort(key=lambda slot: (-slot["drop"]["value"], slot["name"]))
    worst = slots[0] if slots else None
    details = {
        "asked": slots,
        "worst_asked": worst["name"] if worst else None,
        "worst_asked_drop": worst["drop"]["value"] if worst else None,
    }
    return Measured(figures, details)


def _detail(question: Question) -> Row:
    return {"name": question.slot, "choices": len(question.choices), "chance": question.chance}


ASKED = Metric(columns=("asked", "found"), measure=_measure)
