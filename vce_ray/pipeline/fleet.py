"""Many concepts on one cluster: a run for each, work they share done once, one that fails failing alone.

    vce-ray fleet openmoji noto my_artist.yaml --store s3://bucket/runs
    vce-ray fleet artists.yaml

A fleet file lists concepts, each by name, by file, or with settings of its own; the other keys are RunConfig's and hold
for all of them:

    seed: 1
    evaluation: {num_erase: 600}
    concepts:
      - openmoji
      - my_artist.yaml
      - {concept: noto, train: {steps: 200}}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vce_ray.defaults import Settings, default_settings, merged
from vce_ray.errors import UserError, format_error
from vce_ray.evaluation.summary import write_summary
from vce_ray.pipeline.erase import erase
from vce_ray.pipeline.run import Run
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store


@dataclass
class Member:
    """One concept of a fleet: its run, or what keeps it from one; then the figures of its evaluation."""

    concept: str
    run: Run | None = None
    fault: str | None = None
    figures: dict[str, Any] | None = None


def read_fleet(concepts: Sequence[str], shared: Settings) -> list[Settings]:
    """The settings of each run: a fleet file's, or those of concepts that are named, over what holds for all.

    Raises:
        UserError: a fleet file that is none, or a concept twice.
    """
    entries: list[Settings] = []
    for given in concepts:
        listed = _fleet_file(given)
        if listed is None:
            entries.append(merged(shared, {"concept": given}))
            continue
        for entry in listed.pop("concepts"):
            own = {"concept": entry} if isinstance(entry, str) else entry
            if not isinstance(own, dict) or not isinstance(own.get("concept"), str):
                raise UserError(f"{given}: {entry!r} is no concept; give a name, a file, or {{concept: name, ...}}")
            entries.append(merged(merged(shared, listed), own))
    names = [(entry.get("name"), entry["concept"], entry.get("seed")) for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"concept {name[1]!r} stands in the fleet twice: leave one out, or give it another name")
    return entries


def _fleet_file(path: str) -> Settings | None:
    """What a fleet file says; None for a concept's name or file."""
    if not path.endswith((".yaml", ".yml")):
        return None
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(said, dict) or "concepts" not in said:
        return None
    if not isinstance(said["concepts"], list) or not said["concepts"]:
        raise UserError(f"{path}: concepts is a list of at least one")
    return said


def open_fleet(settings: Sequence[Settings], say: Callable[[str, str], None]) -> list[Member]:
    """A member for each of the settings; what is wrong with one of them is its own fault.

    Args:
        say: takes a run's name and a line about it.
    """
    members = []
    for entry in settings:
        member = Member(Path(entry["concept"]).stem)
        members.append(member)
        try:
            train = entry.get("train")
            method = train.get("method", "vsafe_dpo") if isinstance(train, dict) else "vsafe_dpo"
            defaults = default_settings(entry["concept"], entry.get("base", "emoji-world"), method)
            config = RunConfig.model_validate(merged(defaults, entry))
            member.run = Run(config, say=lambda line, name=member.concept: say(name, line))
        except (UserError, ValidationError) as error:
            member.fault = " ".join(str(error).split())
            say(member.concept, f"left out: {member.fault}")
    return members


def erase_fleet(members: Sequence[Member], store: Store, name: str) -> str:
    """Erases all concepts that can be, and writes a summary of the fleet.

    Returns:
        Where the summary page lies: fleets/<name>/index.html below the store.

    Raises:
        UserError: the name leads out of the store.
    """
    began, place = time.time(), store.child(f"fleets/{name}")
    runs = [member.run for member in members if member.run is not None]
    ended = erase(runs) if runs else {}
    for member in members:
        if member.run is not None:
            figures = ended[member.run.name]
            if isinstance(figures, BaseException):
                member.fault = format_error(figures)
            else:
                member.figures = figures
    asked, drawn = shared_pictures(runs)
    rows = [
        {
            "concept": member.concept,
            "run": member.run.name if member.run else None,
            "fault": member.fault,
            "figures": member.figures,
            "stages": member.run.record["stages"] if member.run else {},
        }
        for member in members
    ]
    summary = {"name": name, "seconds": round(time.time() - began, 1), "asked": asked, "drawn": drawn, "runs": rows}
    place.write_json("fleet.json", summary)
    place.write_bytes("index.html", write_summary(summary).encode())
    return place.where("index.html")


def shared_pictures(runs: Sequence[Run]) -> tuple[int, int]:
    """How many pictures of the base the runs asked for, and how many of them are distinct: those are drawn."""
    asked, distinct = 0, set()
    for run in runs:
        for name in ("prompts", "evaluation/prompts"):
            rows = run.store.stage(name).inventory(["prompt", "seed"])
            asked += rows.num_rows
            distinct.update((name, *key) for key in zip(rows["prompt"].to_pylist(), rows["seed"].to_pylist()))
    return asked, len(distinct)
