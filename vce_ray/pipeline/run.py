"""One run: its settings, its place in the store, and `run.json`, which tells the truth about each of its stages.

A killed run goes on with the same command: nothing but the run's store holds state.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from vce_ray.concepts.concept import Concept, load_concept
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.models.load import EMBEDDED, judge_folder, model_config, model_folder
from vce_ray.pairs.captioner import check_captioner, open_refiner
from vce_ray.pairs.prompts import read_prompts
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

STAGES = ("prompts", "unsafe", "captions", "safe", "pairs", "reference", "training", "evaluation", "report")
FLOW = ("unsafe", "captions", "safe", "reference")
"""Those that actors make in one flow, in their order, and whose rows may be rejected."""
PACKAGES = ("vce_ray", "torch", "transformers", "ray", "peft", "open_clip_torch", "pyarrow")
RUN = "run.json"
TRAINING = "training.json"
"""The figures of each step: loss, margin, log-probs of both sides, gradient norm."""


class Run:
    """A run's task, and the record of its stages."""

    def __init__(self, config: RunConfig, say: Callable[[str], None] = print):
        """Checks all settings and the store, before any model loads.

        Raises:
            UserError: unknown concept or base, settings that contradict each other, or a run of this name that was
                made with other settings.
            StoreError: the store cannot be reached.
        """
        self.config, self.say = config, say
        model_config(model_folder(config.base))
        judge_folder(config.base, config.evaluation.judge)
        check_captioner(config.reader, config.base)
        if config.refiner is not None:
            open_refiner(config.refiner)
        self.concept: Concept = load_concept(config.concept, catalogue_of(config.base))
        if config.prompts_file is not None:
            read_prompts(config.prompts_file)
        self.name = config.name or f"{self.concept.name}-{config.train.method.replace('_', '-')}-{config.seed}"
        self.store = Store(config.store).child(self.name)
        self.task = Task(self.name, config, self.concept, self.store)
        settings = config.model_dump(mode="json", exclude={"store", "cluster"})
        says = self.concept.model_dump(
            mode="json", exclude={"train", "pairs"}
        )  # of which the settings have what is used
        if self.store.exists(RUN):
            self.record = self.store.read_json(RUN)
            changed = [key for key in settings if self.record["config"].get(key) != settings[key]]
            if self.record["concept"] != says:
                changed.append("what its concept says")
            if changed:
                raise UserError(
                    f"run {self.name} in {self.store.where()} was started with other settings ({', '.join(changed)}): "
                    "give it the same ones to go on, or another --name"
                )
        else:
            self.record = {"name": self.name, "config": settings, "concept": says}
            self.record |= {"stages": {}, "versions": versions(), "git": git_revision()}
        self.record |= {"status": "running", "error": None}
        self._write()

    def _write(self) -> None:
        self.store.write_json(RUN, self.record)

    def done(self, stage: str) -> bool:
        """Whether a stage has come to its end."""
        return self.record["stages"].get(stage, {}).get("state") == "done"

    def begin(self, *stages: str) -> None:
        """Records that these stages run."""
        for stage in stages:
            self.record["stages"][stage] = {"state": "running", "started": time.time()}
        self._write()

    def end(self, stage: str, **facts: Any) -> None:
        """Records that a stage is done, with what is to be told of it, and says so."""
        begun = self.record["stages"][stage]["started"]
        seconds = round(time.time() - begun, 1)
        self.record["stages"][stage] = {"state": "done", "started": begun, "seconds": seconds, **facts}
        self._write()
        self.tell(stage, f"{seconds:6.1f} s  " + "  ".join(f"{key} {value}" for key, value in facts.items()))

    def tell(self, stage: str, what: str) -> None:
        """A line about a stage."""
        self.say(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage:<10} {what}")

    def finish(self, status: str, error: str | None = None) -> None:
        """Writes the end of the run: done, failed or stopped."""
        for stage in self.record["stages"].values():
            if stage["state"] == "running":
                stage["state"] = status
        self.record |= {"status": status, "error": error}
        self._write()

    def rows(self, stage: str) -> dict[str, Any]:
        """How many rows a published stage has, and how many it rejected."""
        manifest = self.store.stage(stage).manifest()
        assert manifest is not None, f"stage {stage} has just been published"
        rejected = manifest["facts"].get("rejected")
        return {"rows": manifest["rows"]} | ({"rejected": rejected} if rejected else {})


def catalogue_of(base: str) -> str:
    """Which catalogue of concepts speaks to a base model."""
    return "emoji_world" if base == EMBEDDED else ""


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def git_revision() -> str | None:
    """The commit of the checkout that runs, '+' after it where files differ from it; None outside a checkout."""
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
