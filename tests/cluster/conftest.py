"""A cluster of three Ray nodes, each with its own address, and an S3 server that all of them reach."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from secrets import token_hex
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from network import Network, unsupported
from nodes import Cluster
from proxy import FaultyProxy

NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@pytest.fixture
def uri(s3_uri: Callable[[str], str]) -> str:
    """URI of an empty store on the S3 server, as this machine reaches it."""
    return s3_uri(f"cluster-{uuid4().hex}")


@pytest.fixture(scope="module")
def cluster_of_module(s3_uri: Callable[[str], str]) -> Iterator[Cluster]:
    """Three nodes in one network. `cluster` starts them; they run until the last test is over."""
    if reason := unsupported():
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token_hex(24),
        "RES_OPTIONS": "timeout:1 attempts:1",  # the namespaces cannot reach a name server
        "RAY_health_check_period_ms": "1000",  # detects a lost node after about 3 s instead of 15
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
def cluster(cluster_of_module: Cluster) -> Cluster:
    """The three nodes, all alive, and a working S3 server."""
    cluster_of_module.restore()
    return cluster_of_module
