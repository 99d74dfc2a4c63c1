"""How far a run is: what its stages are doing, counted in its store, and what they have done, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vce_ray.storage.stage import Stage
from vce_ray.storage.store import Store


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is, in rows or training steps."""

    done: int
    total: int
    """What it will have done at its end; rows that an earlier stage has yet to reject are still counted."""
    note: str = ""


class RowCounts:
    """Counts the rows that actors have made of a run's stages.

    Costs one listing for each `look`, and opens each part once, as parts never change.
    """

    def __init__(self, store: Store):
        self.store = store
        self._parts: dict[str, list[str]] = {}
        self._rows: dict[str, int] = {}
        self._to_erase: int | None = None

    def look(self) -> None:
        """List the run's parts. Raises StoreError if the store fails."""
        self._parts = {}
        for file in self.store.list():
            folder, _, name = file.rpartition("/")
            if name.endswith(".parquet"):
                self._parts.setdefault(folder, []).append(name)

    def progress(self, stage: str) -> StageProgress | None:
        """Return how far a stage of actors was at the last look, or None for other stages.

        Raises:
            StoreError: the store fails.
        """
        if stage == "unsafe":
            return StageProgress(self._count("unsafe"), self._count("prompts"))
        if stage in ("captions", "safe"):
            before = self._count("rejects/captions") if stage == "safe" else 0
            rejected = self._count(f"rejects/{stage}")
            note = f"{rejected} rejected" if rejected else ""
            return StageProgress(self._count(stage) + rejected, self._prompts_to_erase() - before, note)
        if stage == "reference":
            lost = sum(self._count(f"rejects/{name}") for name in ("captions", "safe"))
            return StageProgress(self._count("reference"), self._prompts_to_erase() - lost)
        if stage == "evaluation":  # the base draws for it long before the stage begins
            drawn = self._count("evaluation/before") + self._count("evaluation/after")
            return StageProgress(drawn, 2 * self._count("evaluation/prompts"))
        return None

    def _prompts_to_erase(self) -> int:
        if self._to_erase is None:
            kinds: list[str] = self.store.stage("prompts").inventory(["kind"])["kind"].to_pylist()
            self._to_erase = kinds.count("erase")
        return self._to_erase

    def _count(self, folder: str) -> int:
        return sum(self._count_part(folder, part) for part in self._parts.get(folder, ()))

    def _count_part(self, folder: str, part: str) -> int:
        path = f"{folder}/{part}"
        if path not in self._rows:
            self._rows[path] = self.store.stage(folder).count_rows(part)
        return self._rows[path]


def describe_stage(stage: str, facts: Mapping[str, Any], name: str) -> str:
    """Say what a finished stage has made.

    Args:
        facts: what run.json says of the stage.
        name: the concept's.
    """
    rows, rejected = facts.get("rows", 0), facts.get("rejected", 0)
    match stage:
        case "prompts":
            erase = facts.get("erase")
            text = f"{rows} prompts" + (f": {erase} for {name}, {rows - erase} for what is kept" if erase else "")
        case "unsafe":
            text = f"{rows} images"
        case "captions":
            text = f"{rows} of {rows + rejected} images of {name} captioned, and {name} removed from the captions"
        case "safe":
            text = f"{rows} safe images from {rows + rejected} captions"
        case "pairs":
            text = f"{rows} pairs of a safe and an unsafe image"
        case "reference":
            text = f"{rows} pairs scored by the base"
        case "training":
            text = f"{facts.get('step')} steps: {describe_metrics(facts)}"
        case "evaluation":
            shown = [facts.get(f"seen_{when}") for when in ("before", "after")]
            text = f"{name} seen in {' -> '.join(f'{share:.1%}' for share in shown if share is not None)} of the images"
        case _:
            text = facts.get("page", "")
    reasons = ", ".join(f"{reason} ({count})" for reason, count in facts.get("reasons", {}).items())
    return text + (f"; {rejected} rejected: {reasons}" if reasons else f"; {rejected} rejected" if rejected else "")


def describe_metrics(row: Mapping[str, Any]) -> str:
    """Return the metrics of a training step that tell how it goes, of those that its method has."""
    return "  ".join(f"{key} {row[key]:.3f}" for key in ("loss", "margin", "accuracy") if key in row)


def count_reasons(rejects: Stage) -> dict[str, int]:
    """Count the rejects of a stage by reason, the commonest first."""
    return dict(Counter(rejects.inventory(["reason"])["reason"].to_pylist()).most_common())
