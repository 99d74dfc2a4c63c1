"""One run: its task, and `run.json`, the record of its settings and of the state of each stage.

A killed run resumes with the same command: nothing but the run's store holds state.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.ids import stable_id
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.pairs.prompt_file import read_prompts
from vce_ray.pipeline import stages
from vce_ray.pipeline.lease import Lease
from vce_ray.pipeline.progress import RowCounts, StageProgress, count_reasons, describe_metrics, describe_stage
from vce_ray.pipeline.stages import NAMES
from vce_ray.pipeline.tracking import Tracking
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

RUN_FILE = "run.json"
PACKAGES = ("vce_ray", "torch", "transformers", "ray", "peft", "open_clip_torch", "pyarrow")
"""Packages whose versions a run records."""
RECORD = {"name": str, "status": str, "config": dict, "concept": dict, "stages": dict}
"""What every record of a run has, by type."""


class Run:
    """A run's task and its record. pipeline/preflight.py opens one."""

    def __init__(self, task: Task, log: Callable[[str], None] = print):
        """Read the record, if there is one. Nothing is written before `start`.

        Raises:
            UserError: the store has a run of this name with other settings.
            StoreError: the store cannot be reached.
        """
        self.task, self.log = task, log
        self.name, self.config, self.concept, self.store = task.name, task.config, task.concept, task.store
        self.lease = Lease(self.store, log)
        self.tracking = Tracking(task, log)
        self.trained: Mapping[str, Any] | None = None
        """The last step of a training under way: its row of the training history."""
        self._counts = RowCounts(self.store)
        own = self.config.prompts_file
        self._prompts_digest = stable_id(read_prompts(own, self.config.prompt_column)) if own is not None else None
        self.record = self._open_record()

    def _open_record(self) -> dict[str, Any]:
        """Return the record to go on with. Raises as the constructor does."""
        new = {"name": self.name, "config": self.config.recorded()}
        new["concept"] = _recorded(self.concept)
        new |= {"prompts_digest": self._prompts_digest} if self._prompts_digest else {}
        new |= {"stages": {}, "versions": versions(), "git": git_revision()}
        if not self.store.exists(RUN_FILE):
            return new
        record = read_record(self.store)
        if not self.store.stage(NAMES[0]).published():
            return new  # settings bind once something was made with them
        changed = _differences(RunConfig.from_record(record["config"]).recorded(), new["config"])
        if _recorded(Concept.model_validate(record["concept"])) != new["concept"]:
            changed.append("the concept's definition")
        if "prompts_digest" in record and record["prompts_digest"] != self._prompts_digest:
            changed.append(f"the prompts in {self.config.prompts_file}")
        if changed:
            raise UserError(
                f"run {self.name} in {self.store.where()} was started with other settings ({'; '.join(changed)}): "
                "use the same ones to resume it, or another --name"
            )
        return record

    def start(self) -> None:
        """Take the run's lease and record that the run is running.

        Raises:
            UserError: another driver is making it, and nothing was written; or as the constructor.
        """
        self.lease.acquire()
        try:
            self.record = self._open_record()  # another driver may have gone on since the run was opened
            self._mention_versions()
            self.record |= {"status": "running", "error": None}
            self._write()
        except BaseException:
            self.lease.release()
            raise

    def finish(self, status: str, error: str | None = None) -> None:
        """Record the end of the run (done, failed or stopped) and give its lease back."""
        for stage in self.record["stages"].values():
            if stage["state"] == "running":
                stage["state"] = status
        self.record |= {"status": status, "error": error}
        try:
            self._write()
        finally:
            self.lease.release()
            self.tracking.close(status)

    def _mention_versions(self) -> None:
        """Say what has changed since the run was begun: its parts may not fit together."""
        now = {"versions": versions(), "code": git_revision()}
        was = {"versions": self.record.get("versions", {}), "code": self.record.get("git")}
        if changed := _differences(was, now):
            self.log(f"run {self.name} was begun by other versions: {'; '.join(changed)}")

    def done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return self.record["stages"].get(stage, {}).get("state") == "done"

    @property
    def unfinished(self) -> bool:
        """Whether the run has work left, for which it needs a cluster."""
        return not self.done(NAMES[-1])

    def start_stage(self, *stages: str) -> None:
        """Record that these stages are running."""
        for stage in stages:
            self.record["stages"][stage] = {"state": "running", "started": time.time()}
        self._write()

    def take_step(self, row: dict[str, Any]) -> None:
        """Show a training step, given as its row of the training history."""
        self.trained = row
        self.tracking.log_step(row)

    def finish_stage(self, stage: str, **facts: Any) -> None:
        """Record that a stage is done, with facts about it, and log what it has made."""
        for folder in stages.stage(stage).folders:
            self.store.stage(folder).sweep()  # the driver that published it may have been killed before it did that
        started = self.record["stages"][stage]["started"]
        seconds = round(time.time() - started, 1)
        self.record["stages"][stage] = {"state": "done", "started": started, "seconds": seconds, **facts}
        self._write()
        self.log_stage(stage, f"{seconds:6.1f} s  {describe_stage(stage, facts, self.concept.name)}")

    def log_stage(self, stage: str, message: str) -> None:
        """Log a line about a stage."""
        self.log(f"[{NAMES.index(stage) + 1}/{len(NAMES)}] {stage:<10} {message}")

    def row_counts(self, stage: str) -> dict[str, Any]:
        """Return how many rows a published stage has, and if it rejected any, how many and for which reasons."""
        manifest = self.store.stage(stage).manifest()
        assert manifest is not None, f"stage {stage} has just been published"
        counts = {"rows": manifest["rows"]}
        if rejected := manifest["facts"].get("rejected"):
            counts |= {"rejected": rejected, "reasons": count_reasons(self.store.stage(f"rejects/{stage}"))}
        return counts

    def progress(self) -> dict[str, StageProgress]:
        """Return how far the stages are that are under way. Raises StoreError if the store fails."""
        found = {}
        self._counts.look()
        for stage, record in list(self.record["stages"].items()):  # other threads start stages
            if record["state"] == "running":
                if stage == "training":
                    row = self.trained or {}
                    found[stage] = StageProgress(row.get("step", 0), self.config.train.steps, describe_metrics(row))
                elif progress := self._counts.progress(stage):
                    found[stage] = progress
        early = self._counts.progress("evaluation") if found and "evaluation" not in self.record["stages"] else None
        return found | ({"evaluation": early} if early and early.done else {})

    def _write(self) -> None:
        self.lease.check()
        self.store.write_json(RUN_FILE, self.record)


def read_record(store: Store, folder: str = "") -> dict[str, Any]:
    """Return the record of the run in a folder of a store.

    Raises:
        StoreError: the record is not valid JSON.
        UserError: there is no record here, or the file is not one.
    """
    path = f"{folder}/{RUN_FILE}".lstrip("/")
    if not store.exists(path):
        raise UserError(f"no run in {store.where(folder)}: give a run's folder, such as runs/deer-vsafe-dpo-0")
    record = store.read_json(path)
    found = record if isinstance(record, dict) else {}
    if missing := [key for key, kind in RECORD.items() if not isinstance(found.get(key), kind)]:
        raise UserError(
            f"{store.where(path)} is not the record of a run, which has {', '.join(missing)}: give another folder, or "
            "restore the file"
        )
    return found


def recorded_task(store: Store) -> Task:
    """Return the task of a run from its record alone. Raises as `read_record` does."""
    record = read_record(store)
    return Task(record["name"], RunConfig.from_record(record["config"]), Concept(**record["concept"]), store)


def _recorded(concept: Concept) -> dict[str, Any]:
    """Return the definition of a concept as a run records it, without what the config contains.

    A record of an earlier version goes through `Concept` before it is compared, which adds the fields it lacks.
    """
    return concept.model_dump(mode="json", exclude={"train", "pairs"})


def _differences(recorded: dict[str, Any], asked: dict[str, Any], path: str = "") -> list[str]:
    """Name the settings that differ, with both values."""
    found = []
    for key in dict.fromkeys((*recorded, *asked)):
        was, now, name = recorded.get(key), asked.get(key), f"{path}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{name}.")
        elif was != now:
            found.append(f"{name} {now}, was {was}")
    return found


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def git_revision() -> str | None:
    """Return the commit that this package runs from, with '+' if files differ from it; None outside a checkout."""
    try:
        command, here = ["git", "describe", "--always", "--dirty=+"], Path(__file__).parent
        out = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
