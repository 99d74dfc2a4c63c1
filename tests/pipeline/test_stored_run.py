"""A run that version 0.1.0 made (tests/data/run_0_1) is read, resumed, evaluated and reused by this version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pytest

import vce_ray
from vce_ray.cli.app import main
from vce_ray.dataflow.fanout import open_refs, publish
from vce_ray.dataflow.schemas import BEFORE_AFTER, REJECTS
from vce_ray.evaluation import detectors
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.evaluation.draw_and_detect import DrawAndDetect
from vce_ray.evaluation.prompts import evaluation_prompts
from vce_ray.models.adapter import read_card
from vce_ray.models.folder import base_stamp, folder_revision, model_folder
from vce_ray.pairs.build import run_prompts
from vce_ray.pairs.generate import sample_id
from vce_ray.pipeline.before_after import evaluation_step
from vce_ray.pipeline.erase import report_data
from vce_ray.pipeline.pair_flow import pair_steps
from vce_ray.pipeline.preflight import open_run
from vce_ray.pipeline.reuse import reuse_pairs
from vce_ray.pipeline.run import Run, recorded_task
from vce_ray.pipeline.stages import NAMES, PAIR_FLOW
from vce_ray.pipeline.status import status_lines
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

STORED = Path(__file__).parents[1] / "data/run_0_1"
FLAGS = ["--lora-rank", "1", "--steps", "2", "--pairs", "3", "--keep", "4", "--judged", "4", "--judged-keep", "6"]
COMMAND = ["erase", "deer", "--name", "stored", "--batch-size", "4", *FLAGS]


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    copytree(STORED, tmp_path / "stored")
    return Store(tmp_path / "stored")


def test_its_command_finds_nine_stages_published_before(
    stored: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing listens there: no cluster is needed
    record = stored.read_bytes("run.json")
    assert main([*COMMAND, "--store", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("published before") == len(NAMES) == 9 and "report:" in printed
    assert stored.read_bytes("run.json") == record
    assert main([*COMMAND, "--store", str(tmp_path), "--steps", "3"]) == 2
    assert "other settings (train.steps 3, was 2)" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["running", "failed", "stopped"])
def test_a_finished_run_whose_driver_was_killed_is_marked_as_done(stored: Store, tmp_path: Path, status: str) -> None:
    stored.write_json("run.json", stored.read_json("run.json") | {"status": status})
    assert main([*COMMAND, "--store", str(tmp_path)]) == 0
    assert stored.read_json("run.json")["status"] == "done"


def test_a_stage_is_recorded_as_done_once_nothing_but_its_parts_is_left(stored: Store) -> None:
    """A driver that is killed right after it published a stage leaves parts that are not published."""
    run, rejects = Run(recorded_task(stored)), stored.stage("rejects/safe")
    row = {"row_id": "r", "stage": "safe", "reason": "fault", "detail": "", "attempt": 1}
    rejects.publish([rejects.write_part(pa.Table.from_pylist([row], REJECTS))], key="row_id")
    left = ["safe/part-left.parquet", "rejects/safe/part-left.parquet"]
    before = stored.list()
    for path in left:
        stored.write_bytes(path, b"")
    run.start_stage("safe")
    assert set(left) <= set(stored.list())
    run.finish_stage("safe")
    assert stored.list() == before and run.done("safe")


def test_its_settings_are_read_as_they_were_recorded(stored: Store) -> None:
    recorded = stored.read_json("run.json")["config"]
    added = {
        "prompt_column": "prompt",
        "prompt_set": None,
        "prompt_category": None,
    }  # settings of later versions, with their defaults
    judges = {"evaluation": recorded["evaluation"] | {"judge": []}}  # one or none then, as null or a string
    assert RunConfig.from_record(recorded).recorded() == recorded | added | judges
    vanilla = recorded | {"train": recorded["train"] | {"method": "dpo", "beta": 0.1, "prompt_mode": "given"}}
    read = RunConfig.from_record(vanilla).recorded()
    assert read["train"].items() <= vanilla["train"].items(), "what vanilla DPO recorded and never used is left out"
    assert {"token_drop", "keep_weight", "keep_batch_size"} <= vanilla["train"].keys() - read["train"].keys()


def test_its_prompts_and_ids_are_made_again_by_this_version(stored: Store) -> None:
    task = recorded_task(stored)
    for stage, prompts in (("prompts", run_prompts), ("evaluation/prompts", evaluation_prompts)):
        rows = {row["prompt_id"]: row for row in stored.stage(stage).read().to_pylist()}
        made = {prompt.prompt_id: dict(vars(prompt)) for prompt in prompts(task.config, task.concept)}
        for prompt in made.values():
            del prompt["asked"]  # recorded since
        assert made == rows
    revision = folder_revision(model_folder(task.config.base))
    for row in stored.stage("unsafe").read(columns=["sample_id", "prompt", "seed"]).to_pylist():
        assert row["sample_id"] == sample_id(revision, row["prompt"], row["seed"], task.config.sampling)
    for name, step in pair_steps({"stored": task}).items():
        manifest = stored.stage(name).manifest()
        assert manifest is not None
        assert manifest["schema"] == {field.name: str(field.type) for field in step.schema_of("stored")}
    facts = stored.stage("reference").manifest()
    assert facts is not None and base_stamp(task.config.base).items() <= facts["facts"].items()


def test_its_metrics_and_report_come_out_the_same(stored: Store) -> None:
    from vce_ray.evaluation.report import write_report

    metrics = stored.read_json("evaluation/metrics.json")
    assert vce_ray.evaluate(stored.uri) == metrics
    data = report_data(Run(recorded_task(stored)))
    assert len(data.evaluation) == sum(stored.stage(f"evaluation/{arm}").read().num_rows for arm in BEFORE_AFTER)
    page = write_report(data)
    assert "What else the prompt asked for" not in page, "its evaluation does not say"
    old = stored.read_bytes("report/index.html").decode()
    assert page.count('<svg viewBox="0 0 340 190"') == old.count("<svg") == 7, "all curves of VSafe-DPO"
    assert page.count("data:image/png") == old.count("data:image/png")
    lines = list(status_lines(stored))
    assert lines[0] == "stored: done" and len(lines) == 1 + len(NAMES)


def test_its_evaluation_goes_on_with_the_columns_that_it_began_with(stored: Store) -> None:
    task, stage = recorded_task(stored), stored.stage("evaluation/before")
    rows = stage.read().num_rows
    columns = stage.read().column_names
    for path in ("manifest.json", stage.parts()[-1]):
        stored.delete_prefix(f"evaluation/before/{path}")
    step = evaluation_step("before", {"stored": task})
    prompts = {row["prompt_id"]: row for row in stored.stage("evaluation/prompts").read().to_pylist()}
    missing = [prompts[key] | {"run": "stored"} for key in open_refs(task, step)["key"].to_pylist()]
    assert 0 < len(missing) < rows
    made, _ = DrawAndDetect({"stored": task}, "before")(missing)
    stage.write_part(pa.Table.from_pylist(made, step.schema_of("stored")))
    assert publish(task, step)["rows"] == rows and set(stage.read().column_names) == set(columns)
    assert vce_ray.evaluate(stored.uri)["images"] == 2 * rows
    fresh = evaluation_step("before", {"new": replace(task, store=Store(stored.root).child("new"))})
    assert {"asked", "found", "embedding"} <= set(fresh.schema_of("new").names)


def test_a_detector_that_was_added_since_does_not_hide_its_evaluation(
    stored: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(ClipDetector):
        name = "later"
        columns = pa.schema({"later": pa.float64()}.items())

    monkeypatch.setattr(detectors, "DETECTORS", (*detectors.DETECTORS, Later))
    assert vce_ray.evaluate(stored.uri) == stored.read_json("evaluation/metrics.json")
    assert "later" not in report_data(Run(recorded_task(stored))).evaluation[0]


def test_its_adapter_is_loaded_and_its_pairs_are_reused(stored: Store, tmp_path: Path) -> None:
    folder = stored.fetch("adapter", tmp_path / "adapter")
    assert read_card(folder)["lora"] == {"rank": 1, "alpha": 32}
    image = vce_ray.draw(vce_ray.load_model(adapter=str(folder)), "a fox")[0]
    assert image.size == (64, 64)
    run = open_run({"concept": "deer", "store": str(tmp_path), "name": "again", "pairs_of": ("stored",)})
    reuse_pairs(run.task)
    assert run.store.stage("pairs").read().equals(stored.stage("pairs").read())
    assert all(run.store.stage(name).published() for name in PAIR_FLOW)
