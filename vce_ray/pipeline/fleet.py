"""Many concepts on one cluster: one run each, shared work done once, and a failing run fails alone.

    vce-ray fleet openmoji noto my_artist.yaml --store s3://bucket/runs
    vce-ray fleet artists.yaml

A fleet file lists concepts by name, by file, or with settings of their own. Its other keys are RunConfig's and apply to
all of them:

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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vce_ray.defaults import Settings, merged
from vce_ray.errors import UserError, format_error, quote
from vce_ray.evaluation.summary import write_summary
from vce_ray.pipeline.erase import erase
from vce_ray.pipeline.preflight import ask_endpoints, check_run
from vce_ray.pipeline.run import Run
from vce_ray.pipeline.session import session
from vce_ray.storage.store import Store
from vce_ray.yaml_file import read_yaml


@dataclass
class Member:
    """One concept of a fleet: its run, or why it has none; later the metrics of its evaluation."""

    concept: str
    run: Run | None = None
    error: str | None = None
    metrics: dict[str, Any] | None = None


def read_fleet(concepts: Sequence[str], shared: Settings) -> list[Settings]:
    """Return the settings of each run: those of a fleet file or a named concept over the shared ones.

    Raises:
        UserError: a fleet file is invalid, or a concept appears twice.
    """
    entries: list[Settings] = []
    for name_or_file in concepts:
        listed = _fleet_file(name_or_file)
        if listed is None:
            entries.append(merged(shared, {"concept": name_or_file}))
            continue
        for entry in listed.pop("concepts"):
            own = {"concept": entry} if isinstance(entry, str) else entry
            if not isinstance(own, dict) or not isinstance(own.get("concept"), str):
                raise UserError(
                    f"{name_or_file}: {quote(entry)} is not a concept; give a name, a file, or {{concept: name, ...}}"
                )
            entries.append(merged(merged(shared, listed), own))
    keys = [(entry.get("name"), entry["concept"], entry.get("seed", 0)) for entry in entries]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"concept {quote(key[1])} is in the fleet twice: remove one, or give it another name")
    return entries


def _fleet_file(path: str) -> Settings | None:
    """Read a fleet file. Returns None for a concept's name or file."""
    if not path.endswith((".yaml", ".yml")):
        return None
    content = read_yaml(path)
    if not isinstance(content, dict) or "concepts" not in content:
        return None
    if not isinstance(content["concepts"], list) or not content["concepts"]:
        raise UserError(f"{path}: concepts must be a list of at least one")
    return content


def open_fleet(settings: Sequence[Settings], log: Callable[[str, str], None]) -> list[Member]:
    """Return a member for each of the settings. One with unusable settings has an error instead of a run.

    Args:
        log: takes a run's name and a line about it.

    Raises:
        CaptionerError: an endpoint that the runs share gives no usable answer.
    """
    members = []
    for entry in settings:
        member = Member(Path(entry["concept"]).stem)
        members.append(member)
        try:
            member.run = check_run(entry, log=lambda line, name=member.concept: log(name, line))
        except UserError as error:
            member.error = " ".join(str(error).split())
            log(member.concept, f"skipped: {member.error}")
    ask_endpoints([member.run for member in members if member.run is not None])
    return members


def erase_fleet(
    members: Sequence[Member],
    store: Store,
    name: str,
    open_session: Callable[[], AbstractContextManager[None]] = session,
) -> str:
    """Erase all concepts that have a run, and write a summary of the fleet.

    Args:
        open_session: as for `erase`.

    Returns:
        Where the summary page is: fleets/<name>/index.html below the store.

    Raises:
        UserError: the name leads out of the store.
    """
    started, place = time.time(), store.child(f"fleets/{name}")
    runs = [member.run for member in members if member.run is not None]
    results = erase(runs, open_session=open_session) if runs else {}
    for member in members:
        if member.run is not None:
            result = results[member.run.name]
            if isinstance(result, BaseException):
                member.error = format_error(result)
            else:
                member.metrics = result
    asked, drawn = shared_images(runs)
    rows = [
        {
            "concept": member.concept,
            "run": member.run.name if member.run else None,
            "fault": member.error,
            "figures": member.metrics,
            "stages": member.run.record["stages"] if member.run else {},
        }
        for member in members
    ]
    summary = {"name": name, "seconds": round(time.time() - started, 1), "asked": asked, "drawn": drawn, "runs": rows}
    place.write_json("fleet.json", summary)
    place.write_bytes("index.html", write_summary(summary).encode())
    return place.where("index.html")


def shared_images(runs: Sequence[Run]) -> tuple[int, int]:
    """Return how many images of the base the runs needed, and how many of them are distinct, so were drawn."""
    asked, distinct = 0, set()
    for run in runs:
        for name in ("prompts", "evaluation/prompts"):
            rows = run.store.stage(name).inventory(["prompt", "seed"])
            asked += rows.num_rows
            distinct.update((name, *key) for key in zip(rows["prompt"].to_pylist(), rows["seed"].to_pylist()))
    return asked, len(distinct)
