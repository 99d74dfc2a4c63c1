"""A job on three nodes whose S3 server fails for a while makes what the same run makes on one machine."""

from __future__ import annotations

import pytest
from nodes import Cluster
from proxy import Fault
from runs import ERASE, assert_same, finish, part_of

from vce_ray.store import Store

FAULTS = {"unsafe": (Fault.STOPPED, 20.0), "captions": (Fault.UNAVAILABLE, 10.0), "safe": (Fault.CUT, 10.0)}
"""What begins with the first part of a stage, and for how long."""


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_changes_nothing(cluster: Cluster, alone: Store, uri: str) -> None:
    proxy = cluster.proxy
    met = proxy.suffered.copy()
    for stage, (fault, seconds) in FAULTS.items():
        proxy.once("PUT", part_of(stage), lambda peer, fault=fault, seconds=seconds: proxy.ail(fault, seconds))
    finish(cluster.submit(*ERASE, "--store", cluster.store(uri)))
    assert all(proxy.suffered[fault] > met[fault] for fault, _ in FAULTS.values()), proxy.suffered
    assert_same(uri, alone)
