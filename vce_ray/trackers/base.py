"""The protocol of a tracker: a place besides the store where a run's settings, curves, figures and images are shown.

A new tracker is one module in this folder, one line in `TRACKERS` (`__init__.py`), and an extra of its name in
pyproject.toml:

    class Lines(Tracker):
        name = "lines"

        def __init__(self, run: TrackedRun):
            self.where = str(run.folder / "lines.txt")

        def log_steps(self, rows): ...

Settings are checked without its libraries, so a tracker imports them in the methods that need them. It runs in the
driver. What it raises is reported once and ends the tracking, never the run (pipeline/tracking.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    key: str
    """Identifies the run, also when it resumes in another process: 32 hex digits."""
    name: str
    settings: Mapping[str, Any]
    """Settings, concept and versions, in nested JSON types."""
    folder: Path
    """Where a tracker without a place of its own writes: below the run if its store is a folder, else below the
    current directory. It need not exist."""


class Tracker(ABC):
    """Shows one run. Steps are logged from another thread than the rest, but never two things at once."""

    name: ClassVar[str]
    """What `--track` calls it."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that it imports; the extra of its name installs them."""
    where: str
    """Where to look at it, for a message. Set by the constructor."""

    @abstractmethod
    def __init__(self, run: TrackedRun):
        """Start to show a run, or continue with the one of the same key."""

    @abstractmethod
    def log_steps(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Show the metrics of training steps: `step`, counted from 1, and what the training logs.

        In one process, steps come in order and only once. A run that resumed begins with a step that may have been
        logged before, with the same metrics; showing it twice is to be avoided.
        """

    @abstractmethod
    def log_evaluation(self, figures: Mapping[str, float], image_png: bytes, step: int) -> None:
        """Show the result of a run.

        Args:
            figures: by name; shares and drops in 0..1.
            image_png: one image of prompts before and after.
            step: the last step of the training.
        """

    @abstractmethod
    def close(self, status: Literal["done", "failed", "stopped"]) -> None:
        """Write what is left and mark how the run ended."""


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Flatten nested settings to texts by dotted path, such as {'train.beta': '1.0'}."""
    texts: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{path}.{key}" if path else key
        texts |= flat(value, name) if isinstance(value, Mapping) else {name: str(value)}
    return texts


def by_section(section: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by name with their section before it, such as 'training/loss', without `step`."""
    return {f"{section}/{name}": value for name, value in metrics.items() if name != "step"}
