"""A cluster of three Ray nodes with addresses of their own, and S3 that they all reach."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from secrets import token_hex
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from network import Network, missing
from nodes import Cluster
from proxy import FaultyProxy

NOT_PASSED_ON = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@pytest.fixture
def uri(s3_uri: Callable[[str], str]) -> str:
    """An empty store on the S3 server, as this machine sees it."""
    return s3_uri(f"cluster-{uuid4().hex}")


@pytest.fixture(scope="module")
def whole_cluster(s3_uri: Callable[[str], str]) -> Iterator[Cluster]:
    """Three nodes in their network; `cluster` starts them, and they run until the last test has ended."""
    if lacking := missing():
        pytest.skip(lacking)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token_hex(24),
        "RES_OPTIONS": "timeout:1 attempts:1",  # the namespaces reach no name server
        "RAY_health_check_period_ms": "1000",  # a node that is lost is missed after some 3 s instead of 15
        "RAY_health_check_failure_threshold": "3",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    upstream = parse_qs(urlsplit(s3_uri("any")).query)["endpoint_override"][0].split(":")
    with (
        Network(environment) as network,
        FaultyProxy(network.address, (upstream[0], int(upstream[1]))) as proxy,
    ):
        yield Cluster(network, proxy)


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Cluster:
    """The three nodes, all of them alive, and an S3 server that is sound."""
    whole_cluster.make_whole()
    return whole_cluster
