"""Trackers show a run in the real tools, go on with it when it resumes, and never cost it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from tiny_runs import tiny_config

from vce_ray import trackers
from vce_ray.cli.app import main
from vce_ray.evaluation.report import ReportData
from vce_ray.pipeline.erase import report_data
from vce_ray.pipeline.preflight import open_run
from vce_ray.pipeline.run import Run, recorded_task
from vce_ray.pipeline.tracking import Tracking, figures_of
from vce_ray.storage.store import Store
from vce_ray.trackers import TRACKERS, TrackedRun, Tracker, check_trackers

STORED = Path(__file__).parents[1] / "data/run_0_1"
ROWS = [{"step": step, "loss": 1 / step, "margin": 0.1 * step} for step in range(1, 26)]
"""Metrics of a training of 25 steps."""


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A run, in a current directory of its own: trackers may write there."""
    monkeypatch.chdir(tmp_path)
    return Store(copytree(STORED, tmp_path / "runs/stored"))


def tracking_of(store: Store, *names: str) -> tuple[Tracking, list[str]]:
    """Open the trackers of a run, as its driver does. Returns them and the lines that they log."""
    lines: list[str] = []
    task = recorded_task(store)
    run = Run(replace(task, config=task.config.model_copy(update={"track": names})), lines.append)
    run.tracking.open(run.record)
    return run.tracking, lines


def log(tracking: Tracking, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        tracking.log_step(row)


def data_of(store: Store) -> ReportData:
    return replace(report_data(Run(recorded_task(store))), training=ROWS)


def track_and_resume(store: Store, name: str) -> list[str]:
    """Show a run that fails after fifteen steps, and resumes with all that a checkpoint holds. Returns the lines that
    it logs then."""
    failed, _ = tracking_of(store, name)
    log(failed, ROWS[:12])
    log(failed, ROWS[10:15])  # a worker was lost and repeats two steps
    failed.close("failed")
    resumed, lines = tracking_of(store, name)
    log(resumed, ROWS[:-2])
    resumed.log_evaluation(data_of(store))
    resumed.close("done")
    return lines


def test_tensorboard_shows_curves_figures_image_and_settings_once(stored: Store) -> None:
    lines = track_and_resume(stored, "tensorboard")
    folder = Path(stored.root, "tensorboard")
    assert lines == [f"tracked by tensorboard: tensorboard --logdir {folder}"]
    shown = tensorboard_events(folder)
    assert [(event.step, event.value) for event in shown.Scalars("training/loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in ROWS
    ]
    figures = figures_of(stored.read_json("evaluation/metrics.json"))
    assert {"seen_after", "seen_after_low", "worst_neighbour_drop", "images"} <= figures.keys()
    for figure, value in figures.items():
        assert [(x.step, x.value) for x in shown.Scalars(f"evaluation/{figure}")] == [(25, pytest.approx(value))]
    (image,) = shown.Images("before_after")
    assert image.width > 1000 and image.encoded_image_string.startswith(b"\x89PNG")
    text = shown.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| train.method | vsafe_dpo |" in text and "| seed | 0 |" in text


def tensorboard_events(folder: Path) -> Any:
    """What TensorBoard itself reads from a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def test_mlflow_shows_one_run_with_all_of_it(stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy", reason="the extra mlflow is not installed")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (line,) = track_and_resume(stored, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("vce_ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert line == f"tracked by mlflow: experiment vce_ray, run {run.info.run_id}"
    assert run.info.status == "FINISHED" and run.info.run_name == "stored"
    losses = client.get_metric_history(run.info.run_id, "training/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(row["step"], row["loss"]) for row in ROWS]
    for name, value in figures_of(stored.read_json("evaluation/metrics.json")).items():
        assert run.data.metrics[f"evaluation/{name}"] == value
    assert run.data.params["train.method"] == "vsafe_dpo" and run.data.params["versions.torch"]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["before_after.png"]


def test_wandb_offline_leaves_a_run_to_sync(stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "mine"}.items():
        monkeypatch.setenv(name, value)
    (line,) = track_and_resume(stored, "wandb")
    wandb.teardown()  # writes what is left, as the end of the process does
    folder = Path(line.removeprefix("tracked by wandb: wandb sync "))
    assert folder.parent == tmp_path / "wandb" and stored.read_json("tracking.json")["key"] in folder.name
    (file,) = folder.glob("*.wandb")
    history: list[dict[str, str]] = []
    summary: dict[str, str] = {}
    for record in wandb_records(file):
        if record.HasField("run"):
            assert record.run.project == "mine" and record.run.display_name == "stored"
        if record.HasField("history"):
            history.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
        summary |= {item.key or item.nested_key[0]: item.value_json for item in record.summary.update}
    losses = [float(row["training/loss"]) for row in history if "training/loss" in row]
    assert losses == [row["loss"] for row in ROWS], "it resumed offline, where the first part cannot be continued"
    assert float(summary["evaluation/seen_after"]) == stored.read_json("evaluation/metrics.json")["seen_after"]
    assert list(folder.glob("files/media/images/before_after*.png"))


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a log of blocks in LevelDB's format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


class Lines(Tracker):
    """The tracker that a reader of base.py would write."""

    name = "lines"

    def __init__(self, run: TrackedRun):
        self.where = str(run.folder / "lines.txt")
        self.lines = Path(self.where)
        run.folder.mkdir(parents=True, exist_ok=True)
        self._log(f"{run.name} {run.key} {run.settings['train']['method']}")

    def log_steps(self, rows: Sequence[Mapping[str, float]]) -> None:
        self._log(*(f"step {row['step']}" for row in rows))

    def log_evaluation(self, figures: Mapping[str, float], image_png: bytes, step: int) -> None:
        self._log(f"seen_after {figures['seen_after']}")

    def close(self, status: str) -> None:
        self._log(status)

    def _log(self, *lines: str) -> None:
        with self.lines.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


class Broken(Lines):
    """Fails while the run is under way."""

    name = "broken"

    def log_steps(self, rows: Sequence[Mapping[str, float]]) -> None:
        raise ConnectionError("https://user:secret@tracker/api: gone\n(no route)")


def test_a_tracker_is_one_class_and_one_line(stored: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "lines", Lines)
    tracking, _ = tracking_of(stored, "lines", "lines")
    log(tracking, ROWS[:12])
    shown = Path(stored.root, "tensorboard/lines.txt")
    assert shown.read_text().endswith("step 10\n"), "ten at once, while the training goes on"
    tracking.log_evaluation(data_of(stored))
    tracking.close("done")
    log(tracking, ROWS)
    seen, key = stored.read_json("evaluation/metrics.json")["seen_after"], stored.read_json("tracking.json")["key"]
    expected = [f"stored {key} vsafe_dpo", *(f"step {row['step']}" for row in ROWS), f"seen_after {seen}", "done"]
    assert shown.read_text().splitlines() == expected


def test_a_tracker_that_fails_is_reported_once_and_leaves_the_others_alone(
    stored: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "lines", Lines)
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    Path(stored.root, "tensorboard").write_text("a file where TensorBoard needs a folder")
    _, lines = tracking_of(stored, "tensorboard")
    (line,) = lines
    assert line.startswith("tracker tensorboard failed, and the run goes on without it: FileExistsError:")
    Path(stored.root, "tensorboard").unlink()
    tracking, lines = tracking_of(stored, "broken", "lines")
    log(tracking, ROWS)
    tracking.log_evaluation(data_of(stored))
    tracking.close("done")
    failures = [line for line in lines if "failed" in line]
    assert failures == [
        "tracker broken failed, and the run goes on without it: ConnectionError: https://tracker/api: gone (no route)"
    ]
    shown = Path(stored.root, "tensorboard/lines.txt").read_text().splitlines()
    assert shown.count("done") == 1 and shown.count("step 25") == 1


def test_what_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent(Lines):
        name = "absent"
        packages = ("json", "no_such_package")

    monkeypatch.setitem(TRACKERS, "absent", Absent)
    for flags, message in (
        (["--track", "neptune"], "unknown tracker 'neptune': use one of tensorboard, mlflow, wandb"),
        (["--track", "tensorboard", "--track", "absent"], "absent needs no_such_package, not installed here: run pip"),
    ):
        for command in ("erase", "fleet"):
            assert main([command, "deer", "--store", str(tmp_path / "runs"), *flags]) == 2
            printed = capsys.readouterr()
            assert message in printed.out + printed.err
    assert not (tmp_path / "runs/deer-vsafe-dpo-0").exists()
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=r"pip install '\.\[absent\]' in a checkout"):
        check_trackers(["absent"])


def test_trackers_may_change_when_a_run_resumes(stored: Store) -> None:
    flags = {"lora_rank": 1, "steps": 2}
    settings = {"concept": "deer", "name": "stored", "store": "runs", "sampling": {"batch_size": 4}, "train": flags}
    settings |= {"pairs": {"num_pairs": 3, "num_keep": 4}, "evaluation": {"num_erase": 4, "num_keep": 6}}
    assert open_run(settings | {"track": ("tensorboard",)}).config.track == ("tensorboard",)
    assert "track" not in tiny_config(track=("mlflow",)).recorded()


def test_without_trackers_nothing_is_written_and_none_is_loaded(stored: Store) -> None:
    tracking, lines = tracking_of(stored)
    log(tracking, ROWS)
    tracking.log_evaluation(data_of(stored))
    tracking.close("done")
    assert lines == [] and not stored.exists("tracking.json")
    assert trackers.TRACKERS.keys() == {"tensorboard", "mlflow", "wandb"}
