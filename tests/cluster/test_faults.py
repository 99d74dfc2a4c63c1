"""A job on three nodes that loses a node, its driver or its S3 server gives the same result as one machine. A store
that a node does not see is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from network import WORKER, Node
from nodes import Cluster
from proxy import Fault
from runs import ERASE, SCRIPT, assert_same, finish, part_of
from tiny_runs import NAME

from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration

FAULTS = {
    part_of("unsafe"): (Fault.STOPPED, 20.0),
    part_of("captions"): (Fault.UNAVAILABLE, 10.0),
    part_of("safe"): (Fault.CUT, 10.0),
    f"/{NAME}/ray_train/": (Fault.STOPPED, 20.0),
    f"/{NAME}/adapter/": (Fault.UNAVAILABLE, 10.0),
}
"""Path of an upload: the fault of the S3 server that the first such upload triggers, and its seconds."""


def run_and_lose_a_worker(cluster: Cluster, uri: str, stage: str, *options: str, expected: str = "report:") -> None:
    """Run a job on the worker nodes, and kill the first one that uploads a part of a stage, along with that part."""
    lost: list[Node] = []

    def kill(address: str) -> None:
        lost.append(next(node for node in cluster.workers if node.address == address))
        lost[0].kill()

    cluster.proxy.once("PUT", part_of(stage), kill, {node.address for node in cluster.workers})
    finish(cluster.submit(*ERASE, *options, "--label", WORKER, "--store", cluster.store(uri)), expected)
    assert lost, f"no worker node wrote a part of {stage}"
    assert lost[0].address not in cluster.alive()


def test_a_node_lost_in_generation_changes_nothing(finished: Store, cluster: Cluster, uri: str) -> None:
    run_and_lose_a_worker(cluster, uri, "unsafe", "--pairs-only", expected="pairs:")
    assert_same(uri, finished, "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--caption-actors", "1"]], ids=["one_pool", "three_pools"])
@pytest.mark.parametrize("stage", ["captions", "safe"])
def test_a_node_lost_later_changes_nothing(
    finished: Store, cluster: Cluster, uri: str, stage: str, options: list[str]
) -> None:
    run_and_lose_a_worker(cluster, uri, stage, *options, "--batch-size", "1")
    assert_same(uri, finished)


@pytest.mark.slow
def test_the_same_command_resumes_a_job_whose_driver_was_killed(finished: Store, cluster: Cluster, uri: str) -> None:
    command = [*ERASE, "--store", cluster.store(uri)]
    cluster.proxy.once("PUT", part_of("captions"), lambda peer: cluster.kill_driver(SCRIPT))
    killed = cluster.submit(*command)
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode != 0, output
    finish(cluster.submit(*command))
    assert_same(uri, finished)


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_changes_nothing(finished: Store, cluster: Cluster, uri: str) -> None:
    proxy = cluster.proxy
    before = proxy.failed.copy()
    for path, (fault, seconds) in FAULTS.items():
        proxy.once("PUT", path, lambda peer, fault=fault, seconds=seconds: proxy.inject(fault, seconds))
    finish(cluster.submit(*ERASE, "--store", cluster.store(uri)))
    failed = proxy.failed - before
    assert failed[Fault.STOPPED] == 2 and failed[Fault.UNAVAILABLE] and failed[Fault.CUT], failed
    assert_same(uri, finished)


def test_a_folder_that_a_node_does_not_see_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    other = cluster.workers[1]
    other.kill()
    other.start(cluster.head, hidden=tmp_path)
    try:
        cluster.restore()
        job = cluster.submit(*ERASE, "--store", str(tmp_path))
        output, _ = job.communicate(timeout=120)
    finally:
        other.kill()
    assert job.returncode != 0 and "exit code 2" in output, output
    assert f"node {other.address} does not see the store {tmp_path / NAME}" in output and "--store s3://" in output
    made = [file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")]
    assert [str(file) for file in made if file.parts[1] not in ("lease", "logs")] == [f"{NAME}/run.json"]
    assert "does not see the store" in Store(tmp_path).child(NAME).read_json("run.json")["error"]


@pytest.mark.slow
def test_a_folder_that_every_node_sees_is_a_store(finished: Store, cluster: Cluster, tmp_path: Path) -> None:
    finish(cluster.submit(*ERASE, "--store", str(tmp_path), "--pairs-only"), "pairs:")
    assert_same(str(tmp_path), finished, "stopped")
