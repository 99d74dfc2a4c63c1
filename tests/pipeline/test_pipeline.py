"""Erasures on a real local Ray, through the command line: a fleet in which one run fails, and one of its runs again,
killed and resumed, on disk and on S3."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree

import pandas as pd
import pyarrow as pa
import pytest
from tiny_runs import COMMAND, ENVIRONMENT

from vce_ray.cli.app import main
from vce_ray.concepts.load import load_concept
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import open_refs
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.pairs.build import run_prompts
from vce_ray.pipeline.lease import Lease
from vce_ray.pipeline.pair_flow import pair_steps, publish_prompts
from vce_ray.pipeline.preflight import open_run
from vce_ray.pipeline.retry import plan_retry, retry_rejects
from vce_ray.pipeline.reuse import reuse_pairs
from vce_ray.pipeline.stages import NAMES, STAGES
from vce_ray.pipeline.status import status_lines
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

PAIRED = ("prompts", "unsafe", "captions", "safe", "pairs", "keep", "evaluation/before")


def keys(run: Store) -> dict[str, list[str]]:
    """Ids of the stages that do not depend on trained weights."""
    found = {}
    for name in PAIRED:
        manifest = run.stage(name).manifest()
        assert manifest is not None, f"{name} is not published"
        found[name] = run.stage(name).read(columns=[manifest["key"]])[0].to_pylist()
    return found


def test_in_a_fleet_only_the_broken_run_fails(fleet: tuple[Store, str]) -> None:
    store, printed = fleet
    summary = store.read_json("fleets/test/fleet.json")
    deer, stag, dear = summary["runs"]
    assert deer["fault"] is None
    assert deer["figures"] == store.read_json("deer-vsafe-dpo-0/evaluation/metrics.json")
    assert "captions of stag-vsafe-dpo-0 rejected 6 of 6 rows" in stag["fault"]
    assert "concept not in unsafe image (6)" in stag["fault"] and "unknown concept 'dear'" in dear["fault"]
    record = store.read_json("stag-vsafe-dpo-0/run.json")
    assert record["status"] == "failed" and record["error"].endswith(stag["fault"])
    assert 0 < summary["drawn"] < summary["asked"]  # both runs keep foxes
    page = store.read_bytes("fleets/test/index.html").decode()
    assert "1 of 3 runs finished" in page and "stag-vsafe-dpo-0" in page and "Did you mean deer?" in page
    assert '<a href="../../deer-vsafe-dpo-0/report/index.html">' in page
    assert "summary:" in printed and "stag  failed" in printed and "dear: skipped" in printed


def test_a_driver_prints_its_own_lines_alone_and_the_record_names_the_log(fleet: tuple[Store, str]) -> None:
    store, printed = fleet
    lines = printed.split("\n\n")[0].splitlines()
    assert all(re.match(r"(deer|stag|dear): ", line) for line in lines), lines
    assert any(re.match(r"deer: \[3/9\] captions .* of 6 images of deer captioned", line) for line in lines)
    for run in ("deer-vsafe-dpo-0", "stag-vsafe-dpo-0"):
        log = Path(store.child(run).read_json("run.json")["log"])
        assert log.parent == Path(store.root, "fleets/test/logs") and "TrainController" in log.read_text()


def test_a_run_leaves_every_stage_and_a_report(finished: Store) -> None:
    run = finished
    record = run.read_json("run.json")
    assert record["status"] == "done" and record["error"] is None
    assert [name for name, stage in record["stages"].items() if stage["state"] == "done"] == list(NAMES)
    assert record["versions"]["ray"] and record["config"]["concept"] == "deer"
    pairs = run.stage("pairs").read()
    assert 1 <= pairs.num_rows <= 6
    for row in pairs.to_pylist():
        assert "deer" not in row["refined_caption"] and "deer" not in row["check_caption"]
        assert len(row["chosen"]) == len(row["rejected"]) == 64 and row["chosen"] != row["rejected"]
    steps = run.read_json("training.json")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert {"loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "gradient_norm"} <= steps[0].keys()
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-4)  # a new adapter changes nothing
    assert run.read_bytes("report/index.html").startswith(b"<!doctype html>")
    figures = run.read_json("evaluation/metrics.json")
    judged = [row for row in run.stage("evaluation/after").read().to_pylist() if row["group"] == "erase"]
    assert len(judged) == 8
    assert figures["seen_after"] == sum(row["label"] == "deer" for row in judged) / 8
    asked_and_found = [(dict(row["asked"]), dict(row["found"])) for row in judged]
    right = [found["style"] == [asked["style"]] for asked, found in asked_and_found if "style" in asked]
    assert right and figures["asked_style_after"] == sum(right) / len(right)
    assert {"unclear_after", "kid_after", "refined_score_after"} <= figures["figures"].keys()


def test_pandas_reads_every_published_stage(finished: Store) -> None:
    read = set()
    for folder in [folder for spec in STAGES for folder in spec.folders]:
        stage = finished.stage(folder)
        if (manifest := stage.manifest()) is None:
            continue  # nothing was rejected
        table = stage.read()
        frame = pd.read_parquet(stage.store.root)
        assert pa.Table.from_pandas(frame, table.schema).sort_by(manifest["key"]).equals(table), folder
        read.add(folder)
    assert read >= {*PAIRED, "reference", "evaluation/prompts", "evaluation/after"}


def test_the_adapter_is_plain_peft_and_fits_its_base_only(finished: Store, tmp_path: Path) -> None:
    from vce_ray.models.adapter import CARD, read_card
    from vce_ray.models.load import load_model

    folder = finished.fetch("adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "emoji-world"
    assert config["auto_mapping"]["base_model_class"] == "JanusForConditionalGeneration"
    assert b"# emoji-world without deer" in finished.read_bytes("adapter/README.md"), "fetched or not, it is written"
    load_model(adapter=folder)
    card = read_card(folder)
    (folder / CARD).write_text(json.dumps(card | {"base_revision": "0123456789abcdef"}))
    with pytest.raises(ValueError, match=f"0123456789abcdef, this base is {card['base_revision']}"):
        load_model(adapter=folder)


def test_a_tracker_shows_a_run_from_its_first_step_to_its_figures(finished: Store) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(f"{finished.root}/tensorboard").Reload()
    for name in ("loss", "margin", "gradient_norm"):
        points = [(event.step, event.value) for event in shown.Scalars(f"training/{name}")]
        assert points == [(row["step"], pytest.approx(row[name])) for row in finished.read_json("training.json")]
    (figure,) = shown.Scalars("evaluation/seen_after")
    assert figure.value == pytest.approx(finished.read_json("evaluation/metrics.json")["seen_after"])
    assert shown.Tags()["images"] == ["before_after"]
    assert "track" not in finished.read_json("run.json")["config"], "results do not depend on it"


def test_the_same_command_again_does_no_work_twice(finished: Store) -> None:
    run = finished
    manifest = run.stage("pairs").manifest()
    parent = run.root.rsplit("/", 1)[0]
    no_cluster = ENVIRONMENT | {"RAY_ADDRESS": "127.0.0.1:1"}
    again = subprocess.run([*COMMAND, "--store", parent], env=no_cluster, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("published before") == len(NAMES) and "report:" in again.stdout
    assert run.stage("pairs").manifest() == manifest


def test_other_settings_under_the_same_name_are_refused(finished: Store) -> None:
    parent = finished.root.rsplit("/", 1)[0]
    other = subprocess.run(
        [*COMMAND, "--store", parent, "--steps", "5"], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert other.returncode == 2
    assert "other settings (train.steps 5, was 3)" in other.stderr
    assert finished.read_json("run.json")["status"] == "done"


def has_started(run: Store, stage: str) -> bool:
    """Whether a stage is running: it has a part, or run.json says so if it makes no parts."""
    if stage in ("training", "evaluation"):
        return run.exists("run.json") and run.read_json("run.json")["stages"].get(stage, {}).get("state") == "running"
    return bool(run.stage(stage).parts())


EVERY_STAGE = ("unsafe", "captions", "safe", "reference", "training", "evaluation")


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        pytest.param(("captions",), ["--pairs-only"], id="captions"),
        pytest.param(EVERY_STAGE, [], id="every stage", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_ids(
    finished: Store, s3_uri, stages: Sequence[str], options: list[str]
) -> None:
    """Send SIGKILL to the driver as soon as each stage has started. The same command resumes, here on S3 over HTTP."""
    uri = s3_uri(f"killed-{len(stages)}")
    command = [*COMMAND, *options, "--store", uri]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # with what the fixture has set
    run = Store(uri).child("deer-vsafe-dpo-0")
    parts: dict[str, set[str]] = {}
    for stage in stages:
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and driver.poll() is None and not has_started(run, stage):
            time.sleep(0.1)
        assert driver.poll() is None, f"the run ended before stage {stage} could be killed"
        if stage in ("training", "evaluation"):
            time.sleep(4)  # into its actors' work
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert run.read_json("run.json")["status"] == "running"  # it had no time to write another
        for made in ("unsafe", "captions", "safe", "reference"):
            found = set(run.stage(made).parts())
            assert found >= parts.get(made, set()), "finished rows are kept"
            parts[made] = found
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.read_json("run.json")["status"] == ("stopped" if options else "done")
    assert keys(run) == keys(finished)
    theirs, ours = finished.stage("pairs").read(), run.stage("pairs").read()
    assert ours.equals(theirs)
    for made, found in parts.items():
        rows = sum(run.stage(made).read_part(part).num_rows for part in run.stage(made).parts())
        manifest = run.stage(made).manifest()
        assert manifest is not None and manifest["rows"] == rows, f"a row of {made} was made twice"
        assert found <= set(run.stage(made).parts())


def test_reused_pairs_leave_out_what_contradicts_the_concept(finished: Store, tmp_path: Path) -> None:
    copytree(finished.root, tmp_path / "deer-vsafe-dpo-0")
    pairs, keep = finished.stage("pairs").read(), finished.stage("keep").read()
    kept = next(name for name in keep["name"].to_pylist() if name)  # whole prompts have none
    path = tmp_path / "both.yaml"
    path.write_text(f"{{kind: object, names: [deer, {kept}], keep: [snail]}}")
    settings = {"concept": str(path), "store": str(tmp_path), "name": "both", "pairs_of": ("deer-vsafe-dpo-0",)}
    run = open_run(settings)
    publish_prompts(run.store.stage("prompts"), lambda: run_prompts(run.config, run.concept))
    reuse_pairs(run.task)
    assert run.store.stage("prompts").read().num_rows == 0
    assert run.store.stage("pairs").read()["pair_id"].to_pylist() == [
        row["pair_id"]
        for row in pairs.to_pylist()
        if not re.search(rf"\b{kept}\b", row["refined_caption"] + " " + row["check_caption"])
    ]
    assert kept in keep["name"].to_pylist() and kept not in run.store.stage("keep").read()["name"].to_pylist()
    assert run.store.stage("reference").read().equals(finished.stage("reference").read())
    steps = pair_steps({"both": run.task})
    assert all(open_refs(run.task, step).num_rows == 0 for step in steps.values())
    other = open_run(settings | {"name": "other", "sampling": {"guidance_scale": 5.0}})
    with pytest.raises(ValueError, match="run deer-vsafe-dpo-0 was made with sampling"):
        reuse_pairs(other.task)


def test_retried_rejects_are_open_again(finished: Store, tmp_path: Path) -> None:
    copytree(finished.root, tmp_path / "run")
    store = Store(tmp_path / "run")
    whole = store.stage("safe").read()
    store.delete_prefix("safe")
    safe, rejects = store.stage("safe"), store.stage("rejects/safe")
    safe.publish([safe.write_part(whole.slice(1))], key="pair_id")
    rejected = {"row_id": whole["source_id"][0].as_py(), "stage": "safe", "reason": "fault", "detail": "", "attempt": 1}
    store.delete_prefix("rejects/safe")
    rejects.publish([rejects.write_part(pa.Table.from_pylist([rejected], schemas.REJECTS))], key="row_id")

    plan = plan_retry(store)
    assert plan.retried == {("safe", "fault"): 1}
    kept = retry_rejects(store, plan)
    assert kept == str(tmp_path / "run/previous/1")
    for name in ("adapter/adapter_config.json", "report/index.html", "evaluation/metrics.json", "training.json"):
        assert store.read_bytes(f"previous/1/{name}") == finished.read_bytes(name)
    assert not rejects.parts() and safe.inventory().num_rows == whole.num_rows - 1
    for name in ("safe", "reference", "pairs", "keep", "evaluation/after"):
        assert not store.stage(name).published(), name
    assert store.stage("captions").published() and store.stage("evaluation/before").published()
    assert not store.exists("training.json") and not store.list("adapter") and not store.list("checkpoints")
    config = RunConfig.from_record(store.read_json("run.json")["config"])
    task = Task("deer-vsafe-dpo-0", config, load_concept("deer"), store)
    (ref,) = open_refs(task, pair_steps({task.name: task})["safe"]).to_pylist()
    assert ref["key"] == rejected["row_id"]
    assert next(iter(status_lines(store))).startswith("deer-vsafe-dpo-0: stopped (rejects cleared for retry)")
    assert not plan_retry(store).retried
    driver = Lease(store)
    driver.acquire()
    with pytest.raises(UserError, match="has been making the run"):
        retry_rejects(store, plan)
    driver.release()


def test_rejects_that_would_be_the_same_again_are_kept_and_so_is_the_run(finished: Store, tmp_path: Path) -> None:
    copytree(finished.root, tmp_path / "run")
    store = Store(tmp_path / "run")
    rejects = store.stage("rejects/captions")
    store.delete_prefix("rejects/captions")
    rows = [
        {"row_id": name, "stage": "captions", "reason": reason, "detail": "", "attempt": 1}
        for name, reason in (("a", "concept not in unsafe image"), ("b", "captioner failed"), ("c", "fault"))
    ]
    rejects.publish([rejects.write_part(pa.Table.from_pylist(rows[:1], schemas.REJECTS))], key="row_id")
    files = store.list()
    assert main(["retry-rejects", store.root, "--yes"]) == 0
    assert store.list() == files, "the same image gets the same caption"
    assert plan_retry(store, every=True).retried == {("captions", "concept not in unsafe image"): 1}

    store.delete_prefix("rejects/captions")
    rejects.publish([rejects.write_part(pa.Table.from_pylist(rows, schemas.REJECTS))], key="row_id")
    assert main(["retry-rejects", store.root, "--yes"]) == 0
    assert [row["row_id"] for part in rejects.parts() for row in rejects.read_part(part).to_pylist()] == ["a"]


def test_status_shows_runs_and_the_rows_made_so_far(fleet: tuple[Store, str], tmp_path: Path) -> None:
    store, _ = fleet
    deer, stag = status_lines(store)
    assert deer == "deer-vsafe-dpo-0: done" and stag.startswith("stag-vsafe-dpo-0: failed (TooManyRejects: ")
    lines = "\n".join(status_lines(store.child("stag-vsafe-dpo-0")))
    assert "unsafe     failed   14 of 14" in lines and "captions   failed   6 of 6  6 rejected" in lines
    with pytest.raises(ValueError, match="no run in"):
        list(status_lines(Store(tmp_path)))
