"""A cluster of three Ray nodes with addresses of their own, and S3 over HTTP that they all reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from urllib.parse import parse_qs, urlsplit

import pytest
from network import RAY, Network, missing, wait_for
from proxy import FaultyProxy

ROOT = Path(__file__).parents[2]
NOT_PASSED_ON = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


class Cluster:
    """A head and two workers of one CPU each, and an S3 server at the bridge that can be made to fail."""

    def __init__(self, network: Network, proxy: FaultyProxy):
        self.network, self.proxy = network, proxy
        self.head, *self.workers = (network.node() for _ in range(3))
        self.url = f"http://{self.head.address}:8265"

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """Submits a job, as somebody beside the cluster does; what is returned lasts as long as the job, and prints
        what it prints."""
        line = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *command]
        environment = self.network.environment | {"RAY_API_SERVER_ADDRESS": self.url}
        return subprocess.Popen(
            line, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def store(self, uri: str) -> str:
        """The URI of a store on the sound server, as the nodes see it: through the proxy."""
        return f"{uri.partition('?')[0]}?endpoint_override={self.proxy.address}:{self.proxy.port}&scheme=http"

    def make_whole(self) -> None:
        """Starts the nodes that do not run, and waits until the head knows all of them and no others."""
        self.proxy.heal()
        if not self.head.pids():
            self.head.start()
        for node in self.workers:
            if not node.pids():
                node.start(self.head)
        wait_for("all nodes", lambda: self.alive() == sorted(node.address for node in self.network.nodes), 180)

    def alive(self) -> list[str]:
        """The addresses of the nodes that the head holds to be alive."""
        token = self.network.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=20) as reply:
                nodes = json.load(reply)["data"]["result"]["result"]
        except (OSError, KeyError, TypeError):  # it does not answer yet
            return []
        return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")


@pytest.fixture(scope="session")
def whole_cluster(s3_uri: Callable[[str], str]) -> Iterator[Cluster]:
    """Three nodes that run as long as the tests of this folder."""
    if lacking := missing():
        pytest.skip(lacking)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token_hex(24),
        "RES_OPTIONS": "timeout:1 attempts:1",  # the namespaces reach no name server
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    upstream = parse_qs(urlsplit(s3_uri("any")).query)["endpoint_override"][0].split(":")
    with (
        Network(environment) as network,
        FaultyProxy(network.address, (upstream[0], int(upstream[1]))) as proxy,
    ):
        cluster = Cluster(network, proxy)
        yield cluster


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Cluster:
    """The three nodes, all of them alive, and an S3 server that is sound."""
    whole_cluster.make_whole()
    return whole_cluster
