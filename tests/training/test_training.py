"""Training on real Ray Train: workers change nothing, a killed training resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.train.torch
import torch
from safetensors.torch import load_file
from training_runs import run_config

from vce_ray.config import EMBEDDED
from vce_ray.dataflow import schemas
from vce_ray.models.adapter import attach_adapter
from vce_ray.models.folder import base_stamp
from vce_ray.models.load import load_model
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.training.terms.preference import pair_log_probs
from vce_ray.training.train import Trainings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def local_ray():
    """Start a small Ray and yield its address."""
    context = ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield context.address_info["gcs_address"]
    ray.shutdown()


def copy(store: Store, place: Path) -> Store:
    """Copy the pair set, so that trainings do not share a store."""
    target = Store(place)
    for file in store.list():
        if file.split("/")[0] in ("pairs", "keep", "reference"):
            target.write_bytes(file, store.read_bytes(file))
    return target


def weights(store: Store, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(store.fetch("adapter", folder) / "adapter_model.safetensors")


def test_training_prefers_the_safe_image_and_the_adapter_carries_it(finished: Store, tmp_path: Path) -> None:
    history = finished.read_json("training.json")
    assert history[0]["preference"] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1]["margin"] > 0.05 > abs(history[0]["margin"])
    model, pairs = load_model(), finished.stage("pairs").read().to_pylist()
    prompts = model.encode_prompts([row["prompt"] for row in pairs])
    chosen, rejected = (torch.tensor([row[side] for row in pairs]) for side in ("chosen", "rejected"))
    with torch.no_grad():
        before = pair_log_probs(model, prompts, chosen, rejected)
        attach_adapter(model, finished.fetch("adapter", tmp_path / "adapter"))
        after = pair_log_probs(model, prompts, chosen, rejected)
    margin = (after[0] - before[0]).mean() - (after[1] - before[1]).mean()
    assert margin > 0.05


def test_two_workers_train_the_same_as_one(finished: Store, local_ray, tmp_path: Path) -> None:
    """Replicated weights, also on the base that another run left loaded, and sharded weights, against a run with one
    worker and a base of its own. A run between them with unusable data fails alone."""
    record = finished.read_json("run.json")["config"]
    stores = {name: copy(finished, tmp_path / name) for name in ("whole", "poisoned", "again", "sharded")}
    stores["poisoned"].delete_prefix("reference")
    stage = stores["poisoned"].stage("reference")
    lacking = finished.stage("reference").read().slice(1)
    stage.publish([stage.write_part(lacking)], key="pair_id", **base_stamp(EMBEDDED))
    runs = {
        name: RunConfig.model_validate(
            record | {"train": record["train"] | {"num_workers": 2, "shard": name == "sharded"}}
        )
        for name in stores
    }
    started, finished_runs, steps = [], [], []
    trainings = Trainings(
        [run.train for run in runs.values()],
        1,
        on_start=started.append,
        on_step=lambda name, row: steps.append((name, row["step"])),
        on_finish=finished_runs.append,
    )
    futures = {name: trainings.submit(name, runs[name], store, {"concept": "deer"}) for name, store in stores.items()}
    with pytest.raises(ValueError, match="1 pairs have no reference log-probs"):
        futures.pop("poisoned").result(timeout=600)
    for future in futures.values():
        future.result(timeout=600)
    trainings.close()
    assert started == list(stores) and finished_runs == list(futures)
    assert steps == [(name, step) for name in futures for step in (1, 2, 3)]
    assert not stores["poisoned"].exists("training.json")
    alone, theirs = finished.read_json("training.json"), weights(finished, tmp_path / "alone")
    for name in futures:
        for one, two in zip(alone, stores[name].read_json("training.json"), strict=True):
            for figure in ("loss", "margin", "preservation", "gradient_norm"):
                assert two[figure] == pytest.approx(one[figure], abs=2e-4), (name, figure, one["step"])
        ours = weights(stores[name], tmp_path / f"weights-{name}")
        assert ours.keys() == theirs.keys()
        assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 2e-3


SCRIPT = """
import sys, ray
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.training.train import Trainings
ray.init(address=sys.argv[3])
run = RunConfig.model_validate_json(sys.argv[1])
Trainings([run.train], 1, print, print, print).submit("killed", run, Store(sys.argv[2]), {}).result()
"""


def test_a_killed_training_resumes_from_its_checkpoint(pair_set: Store, local_ray: str, tmp_path: Path) -> None:
    store = copy(pair_set, tmp_path / "killed")
    run = run_config(steps=40, checkpoint_every=2).model_dump_json()
    command = [sys.executable, "-c", SCRIPT, run, store.uri, local_ray]
    driver = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not store.exists("checkpoints/last.json"):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not store.exists("adapter/adapter_model.safetensors")
    latest = settled(store)
    behind = [json.loads(line) for line in store.read_bytes(f"checkpoints/{latest}/0/metrics.jsonl").splitlines()]
    assert len(behind) == latest
    reported: list[dict] = []
    history = trained(run_config(steps=len(behind) + 2, checkpoint_every=2), store, reported)
    assert reported == history, "a new driver hears of the steps before the checkpoint too"
    assert history[: len(behind)] == behind, "steps were repeated"
    assert [row["step"] for row in history] == list(range(1, len(behind) + 3))
    assert store.exists("adapter/adapter_model.safetensors")
    assert not store.list("checkpoints"), "no longer needed"


@pytest.mark.slow
def test_a_training_that_always_fails_fails_alone(pair_set: Store, local_ray: str, tmp_path: Path) -> None:
    """Its workers are restarted four times, then the group goes on to the next run."""
    bad, good = (copy(pair_set, tmp_path / name) for name in ("bad", "good"))
    keep = pair_set.stage("keep").read()
    tokens = pa.array([[30_000] * 64] * keep.num_rows, schemas.TOKENS)  # not in the image vocabulary
    bad.delete_prefix("keep")
    stage = bad.stage("keep")
    stage.publish([stage.write_part(keep.set_column(2, "tokens", tokens))], key="sample_id")
    trainings = Trainings([run_config().train], 1, on_start=print, on_step=print, on_finish=print)
    failing, passing = trainings.submit("bad", run_config(), bad, {}), trainings.submit("good", run_config(), good, {})
    with pytest.raises(ray.train.TrainingFailedError, match="index out of range"):
        failing.result(timeout=600)
    passing.result(timeout=600)
    trainings.close()
    assert good.exists("training.json") and not bad.exists("training.json")


def trained(run: RunConfig, store: Store, reported: list[dict]) -> list[dict]:
    trainings = Trainings(
        [run.train], 1, on_start=print, on_step=lambda name, row: reported.append(row), on_finish=print
    )
    trainings.submit("alone", run, store, {}).result(timeout=600)
    trainings.close()
    return store.read_json("training.json")


def settled(store: Store) -> int:
    """Return the step of the last checkpoint once it no longer changes: workers outlive their driver for a moment."""
    seen = -1
    while (step := store.read_json("checkpoints/last.json")["step"]) != seen:
        seen = step
        time.sleep(4)
    return seen
