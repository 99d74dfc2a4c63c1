"""A job on a cluster of three nodes of which one is lost on the way, against the same run on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import Cluster
from network import Node

from vce_ray.store import Store

TINY = ["--pairs", "6", "--keep", "8", "--steps", "2", "--judged", "8", "--judged-keep", "12", "--batch-size", "2"]
STAGES = ("prompts", "unsafe", "captions", "safe", "pairs", "keep", "evaluation/before")
"""Those that do not depend on trained weights."""
JOB_S = 400


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run on one machine that nothing disturbed."""
    place = tmp_path_factory.mktemp("alone")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "jobs/erase_object.py", "deer", *TINY, "--store", str(place)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=JOB_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Store(place).child("deer-vsafe-dpo-0")


def assert_same(run: Store, alone: Store) -> None:
    """The same ids in every stage, the same tokens and pictures, no row lost and none written twice."""
    assert run.read_json("run.json")["status"] == "done"
    for name in STAGES:
        manifest = run.stage(name).manifest()
        assert manifest is not None, f"{name} is not published"
        ours, theirs = run.stage(name).read(), alone.stage(name).read()
        assert ours[manifest["key"]].equals(theirs[manifest["key"]]), f"{name} has other ids"
        for column in {"tokens", "chosen", "rejected", "image"} & set(ours.column_names):
            assert ours[column].equals(theirs[column]), f"{name} has other {column}"
        written = [file for file in run.stage(name).store.list() if file.endswith(".parquet")]
        rows = sum(run.stage(name).read_part(file).num_rows for file in written)
        assert rows == manifest["rows"] == theirs.num_rows, f"{name} has {rows} rows in its parts"


def finish(job: subprocess.Popen[str]) -> None:
    """Waits for a job that must end well."""
    try:
        printed, _ = job.communicate(timeout=JOB_S)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"the job does not end:\n{job.communicate()[0][-6000:]}")
    assert job.returncode == 0, printed[-6000:]
    assert "report:" in printed


def lose_a_worker(cluster: Cluster, uri: str, stage: str, *options: str) -> Store:
    """Runs a job, and kills the first worker node that begins to write what it made of a stage."""
    lost: list[Node] = []

    def kill(address: str) -> None:
        node = cluster.network.at(address)
        assert node is not None
        node.kill()
        lost.append(node)

    cluster.proxy.once("PUT", f"/{stage}/", kill, {node.address for node in cluster.workers})
    finish(cluster.submit("jobs/erase_object.py", "deer", *TINY, *options, "--store", cluster.store(uri)))
    assert len(lost) == 1, f"no worker came to write {stage}"
    assert not lost[0].pids()
    return Store(uri).child("deer-vsafe-dpo-0")


def test_a_node_lost_in_generation_changes_nothing(cluster: Cluster, alone: Store, s3_uri) -> None:
    assert_same(lose_a_worker(cluster, s3_uri(f"lost-{uuid4().hex}"), "unsafe"), alone)
