"""A job on three nodes that loses one of them, its driver or its S3 server makes what one machine makes."""

from __future__ import annotations

import pytest
from network import WORKER, Node
from nodes import Cluster
from proxy import Fault
from runs import ERASE, SCRIPT, assert_same, finish, part_of
from tiny_runs import NAME

from vce_ray.storage.store import Store

FAULTS = {
    part_of("unsafe"): (Fault.STOPPED, 20.0),
    part_of("captions"): (Fault.UNAVAILABLE, 10.0),
    part_of("safe"): (Fault.CUT, 10.0),
    f"/{NAME}/ray_train/": (Fault.STOPPED, 20.0),
    f"/{NAME}/adapter/": (Fault.UNAVAILABLE, 10.0),
}
"""What ails the S3 server from the first upload to a place on, and for how long."""


def run_and_lose_a_worker(cluster: Cluster, uri: str, stage: str, *options: str, told: str = "report:") -> None:
    """Runs a job on the workers, and kills the first that hands in a part of a stage; that part is lost with it."""
    lost: list[Node] = []

    def kill(address: str) -> None:
        lost.append(next(node for node in cluster.workers if node.address == address))
        lost[0].kill()

    cluster.proxy.once("PUT", part_of(stage), kill, {node.address for node in cluster.workers})
    finish(cluster.submit(*ERASE, *options, "--label", WORKER, "--store", cluster.store(uri)), told)
    assert lost, f"no worker node made anything of {stage}"
    assert lost[0].address not in cluster.alive()


def test_a_node_lost_in_generation_changes_nothing(finished: Store, cluster: Cluster, uri: str) -> None:
    run_and_lose_a_worker(cluster, uri, "unsafe", "--pairs-only", told="pairs:")
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
def test_a_job_whose_driver_was_killed_is_finished_by_the_same_command(
    finished: Store, cluster: Cluster, uri: str
) -> None:
    command = [*ERASE, "--store", cluster.store(uri)]
    cluster.proxy.once("PUT", part_of("captions"), lambda peer: cluster.kill_driver(SCRIPT))
    killed = cluster.submit(*command)
    printed, _ = killed.communicate(timeout=300)
    assert killed.returncode != 0, printed
    finish(cluster.submit(*command))
    assert_same(uri, finished)


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_changes_nothing(finished: Store, cluster: Cluster, uri: str) -> None:
    proxy = cluster.proxy
    met = proxy.suffered.copy()
    for place, (fault, seconds) in FAULTS.items():
        proxy.once("PUT", place, lambda peer, fault=fault, seconds=seconds: proxy.ail(fault, seconds))
    finish(cluster.submit(*ERASE, "--store", cluster.store(uri)))
    suffered = proxy.suffered - met
    assert suffered[Fault.STOPPED] == 2 and suffered[Fault.UNAVAILABLE] and suffered[Fault.CUT], suffered
    assert_same(uri, finished)
