"""Detect a collapsed training from its logged metrics. Needs no torch, so a report can be written without it."""

from __future__ import annotations

from collections.abc import Sequence


def collapsed(margins: Sequence[float], chosen: Sequence[float], rejected: Sequence[float]) -> bool:
    """Return whether a training shows DPO's known collapse: the margin grows while both sides become less likely.

    True if, between the first and the last fifth of the steps, the margin rose and the mean log-ratio of the chosen
    side fell by more than a third of the rejected side's fall: the model then unlearns the safe images too.

    Args:
        margins: chosen minus rejected log-ratio of each step.
        chosen: log-ratio of the safe images to the base, of each step.
        rejected: log-ratio of the unsafe images to the base, of each step.
    """
    fifth = max(1, len(margins) // 5)
    rise = _mean(margins[-fifth:]) - _mean(margins[:fifth])
    chosen_fall = _mean(chosen[:fifth]) - _mean(chosen[-fifth:])
    rejected_fall = _mean(rejected[:fifth]) - _mean(rejected[-fifth:])
    return rise > 0 and rejected_fall > 0 and chosen_fall > rejected_fall / 3


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
