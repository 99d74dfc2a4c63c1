"""One run, from a concept's name to an adapter and a report: the stages in order, each skipped where it is published.

A killed run goes on with the same command: nothing but the run's store holds state, and `run.json` in it tells
the truth about each stage.
"""

from __future__ import annotations

import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from vce_ray import schemas
from vce_ray.concept import Concept, load_concept
from vce_ray.config import RunConfig, TrainConfig
from vce_ray.models.load import EMBEDDED, base_stamp, judge_folder, model_config, model_folder, reads_images
from vce_ray.pairs.prompts import read_prompts
from vce_ray.store import Store

STAGES = ("prompts", "unsafe", "captions", "safe", "pairs", "reference", "training", "evaluation", "report")
PACKAGES = ("vce_ray", "torch", "transformers", "ray", "peft", "open_clip_torch", "pyarrow")
RUN = "run.json"
TRAINING = "training.json"


class Run:
    """A run's place in the store, its settings, and the record in run.json."""

    def __init__(self, config: RunConfig, say: Callable[[str], None] = print):
        """Checks all settings and the store, before any model loads.

        Raises:
            ValueError: unknown concept or base, settings that contradict each other, or a run of this name that was
                made with other settings.
            StoreError: the store cannot be reached.
        """
        self.config, self.say = config, say
        model_config(model_folder(config.base))
        judge_folder(config.base, config.evaluation.judge)
        if not reads_images(config.reader):
            raise ValueError(f"{config.reader!r} cannot describe pictures: name a captioner, such as a Janus-Pro")
        self.concept: Concept = load_concept(config.concept, catalogue_of(config.base))
        if config.prompts_file is not None:
            read_prompts(config.prompts_file)
        self.name = config.name or f"{self.concept.name}-{config.train.method.replace('_', '-')}-{config.seed}"
        self.store = Store(config.store).child(self.name)
        settings = config.model_dump(mode="json", exclude={"store"})
        if self.store.exists(RUN):
            self.record = self.store.read_json(RUN)
            changed = [key for key in settings if self.record["config"].get(key) != settings[key]]
            if changed:
                raise ValueError(
                    f"run {self.name} in {self.store.where()} was started with other settings ({', '.join(changed)}): "
                    "give it the same ones to go on, or another --name"
                )
        else:
            self.record = {"name": self.name, "config": settings, "concept": self.concept.model_dump(mode="json")}
            self.record |= {"stages": {}, "versions": versions(), "git": git_revision()}
        self.record |= {"status": "running", "error": None}
        self._write()

    def _write(self) -> None:
        self.store.write_json(RUN, self.record)

    @contextmanager
    def _stage(self, number: int, name: str) -> Iterator[dict[str, Any]]:
        """Records when a stage begins and ends; what the block puts into the yielded dict is recorded and shown."""
        facts: dict[str, Any] = {}
        begun = time.time()
        self.record["stages"][name] = {"state": "running", "started": begun}
        self._write()
        yield facts
        seconds = round(time.time() - begun, 1)
        self.record["stages"][name] = {"state": "done", "started": begun, "seconds": seconds, **facts}
        self._write()
        shown = "  ".join(f"{key} {value}" for key, value in facts.items())
        self.say(f"[{number}/{len(STAGES)}] {name:<10} {seconds:6.1f} s  {shown}")

    def finish(self, status: str, error: str | None = None) -> None:
        """Writes the end of the run: done, failed or stopped."""
        for stage in self.record["stages"].values():
            if stage["state"] == "running":
                stage["state"] = status
        self.record |= {"status": status, "error": error}
        self._write()

    def execute(self) -> dict[str, Any]:
        """Runs all stages that are not published yet; returns the figures of the evaluation.

        Whatever ends it is written into run.json first.
        """
        try:
            figures = self._execute()
        except KeyboardInterrupt:
            self.finish("stopped", "interrupted")
            raise
        except BaseException as error:
            self.finish("failed", "".join(traceback.format_exception_only(error)).strip())
            raise
        self.finish("done")
        return figures

    def _execute(self) -> dict[str, Any]:
        for number, name in enumerate(STAGES, 1):
            step = getattr(self, f"_{name}")
            if self.record["stages"].get(name, {}).get("state") == "done":
                self.say(f"[{number}/{len(STAGES)}] {name:<10} published before")
                continue
            with self._stage(number, name) as facts:
                facts |= step()
        return self.store.read_json("evaluation/metrics.json")

    # The stages: each returns what run.json should tell of it -------------------------------------------------------

    def _prompts(self) -> dict[str, Any]:
        from vce_ray.pairs.build import publish_prompts

        publish_prompts(self.store, self.config, self.concept)
        return self._rows("prompts")

    def _unsafe(self) -> dict[str, Any]:
        from vce_ray.pairs.build import draw_unsafe

        draw_unsafe(self.store, self.config)
        return self._rows("unsafe")

    def _captions(self) -> dict[str, Any]:
        from vce_ray.pairs.build import describe

        describe(self.store, self.config, self.concept)
        return self._rows("captions")

    def _safe(self) -> dict[str, Any]:
        from vce_ray.pairs.build import draw_safe

        draw_safe(self.store, self.config, self.concept)
        return self._rows("safe")

    def _pairs(self) -> dict[str, Any]:
        from vce_ray.pairs.build import publish_pairs

        publish_pairs(self.store)
        return self._rows("pairs")

    def _reference(self) -> dict[str, Any]:
        from vce_ray.fanout import fan_out
        from vce_ray.pairs.build import dataset
        from vce_ray.training.data import modes_of
        from vce_ray.training.reference import Reference

        modes = modes_of(self.config.train)
        columns = ["pair_id", "prompt", "refined_caption", "chosen", "rejected"]
        fan_out(
            self.store,
            "reference",
            schemas.reference(modes),
            dataset(self.store.stage("pairs"), columns),
            Reference,
            {"base": self.config.base, "modes": modes},
            batch_size=32,
            num_rows=self.config.pairs.num_pairs,
            facts=base_stamp(self.config.base),
        )
        return self._rows("reference")

    def _training(self) -> dict[str, Any]:
        if not self.store.exists(TRAINING):
            from vce_ray.training.train import train

            facts = {"concept": self.concept.name, "run": self.name, "method": self.config.train.method}
            self.store.write_json(TRAINING, train(self.config, self.store, facts))
        last = self.store.read_json(TRAINING)[-1]
        return {key: round(last[key], 4) for key in ("step", "loss", "margin")}

    def _evaluation(self) -> dict[str, Any]:
        from vce_ray.evaluation.metrics import evaluate
        from vce_ray.evaluation.prompts import ARMS, evaluation_prompts
        from vce_ray.evaluation.score import Score
        from vce_ray.fanout import fan_out
        from vce_ray.pairs.build import dataset

        asked = self.store.stage("evaluation/prompts")
        if not asked.published():
            prompts = [asdict(prompt) for prompt in evaluation_prompts(self.config, self.concept)]
            asked.publish([asked.write_part(pa.Table.from_pylist(prompts))], key="prompt_id")
        size = self.config.sampling.batch_size
        rows = self.config.evaluation.num_erase + self.config.evaluation.num_keep
        for arm in ARMS:
            settings = {"run": self.config, "concept": self.concept, "store": self.store, "arm": arm}
            fan_out(self.store, f"evaluation/{arm}", schemas.EVALUATION, dataset(asked), Score, settings, size, rows)
        columns = [name for name in schemas.EVALUATION.names if name != "image"]
        figures = evaluate(self._judged(columns), self.concept)
        self.store.write_json("evaluation/metrics.json", figures)
        told = ("seen_before", "seen_after", "kept_drop", "score_drop")
        return {key: round(figures[key], 4) for key in told if figures[key] is not None}

    def _report(self) -> dict[str, Any]:
        from vce_ray.evaluation.report import write_report

        html = write_report(self.report_data())
        self.store.write_bytes("report/index.html", html.encode())
        return {"page": self.store.where("report/index.html")}

    def report_data(self):
        """All that the report shows, read back from the published stages."""
        from vce_ray.evaluation.report import ReportData

        rejects = [
            self.store.stage(f"rejects/{name}").read(allow_missing=True, columns=schemas.REJECTS.names)
            for name in ("captions", "safe")
        ]
        return ReportData(
            run=self.record,
            concept=self.concept,
            metrics=self.store.read_json("evaluation/metrics.json"),
            evaluation=self._judged(schemas.EVALUATION.names).to_pylist(),
            pairs=self.store.stage("pairs").read().slice(0, 24).to_pylist(),
            training=self.store.read_json(TRAINING),
            rejects=[row for table in rejects for row in table.to_pylist()],
        )

    def _judged(self, columns: list[str]) -> pa.Table:
        from vce_ray.evaluation.prompts import ARMS

        return pa.concat_tables([self.store.stage(f"evaluation/{arm}").read(columns=columns) for arm in ARMS])

    def _rows(self, stage: str) -> dict[str, Any]:
        manifest = self.store.stage(stage).manifest()
        assert manifest is not None, f"stage {stage} has just been published"
        rejected = manifest["facts"].get("rejected")
        return {"rows": manifest["rows"]} | ({"rejected": rejected} if rejected else {})


def default_steps(concept: str, base: str) -> int:
    """Training steps for a concept: TrainConfig's own, half again as many for a style, which must go from every object,
    and a fifth more for each name beyond the first, for the names share the pairs. Raises ValueError where the concept
    is unknown."""
    known = load_concept(concept, catalogue_of(base))
    steps = TrainConfig().steps * (len(known.names) + 4) // 5
    return steps * 3 // 2 if known.kind == "style" else steps


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
