"""How long a run took, from the times that run.json records of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Stage = Mapping[str, Any]
"""What run.json says of a stage: state, started (seconds since 1970) and, once it is done, seconds."""


def span(stages: Iterable[Stage]) -> tuple[float, float] | None:
    """Return when the first stage started and the last one ended; one that has not ended counts up to its start.

    None if no stage has started.
    """
    times = _times(stages)
    return (times[0][0], max(end for _, end in times)) if times else None


def working_seconds(stages: Iterable[Stage]) -> float:
    """Return for how long at least one stage was at work. Stages that work at the same time count once."""
    total, until = 0.0, 0.0
    for start, end in _times(stages):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _times(stages: Iterable[Stage]) -> list[tuple[float, float]]:
    return sorted((stage["started"], stage["started"] + stage.get("seconds", 0.0)) for stage in stages)
