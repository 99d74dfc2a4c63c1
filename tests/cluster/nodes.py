"""A Ray cluster in network namespaces, and jobs submitted to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from network import DASHBOARD_PORT, RAY, Network, wait_for
from proxy import FaultyProxy

ROOT = Path(__file__).parents[2]


class Cluster:
    """A head and two workers with one CPU each, and an S3 server on the bridge that can be made to fail."""

    def __init__(self, network: Network, proxy: FaultyProxy):
        self.network, self.proxy = network, proxy
        self.head, *self.workers = (network.node() for _ in range(3))
        self.url = f"http://{self.head.address}:{DASHBOARD_PORT}"

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """Submit a job from outside the cluster. Returns the process that follows it and prints its output."""
        command_line = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *command]
        environment = self.network.environment | {"RAY_API_SERVER_ADDRESS": self.url}
        return subprocess.Popen(
            command_line, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def store(self, uri: str) -> str:
        """Return a store's URI as the nodes reach it: through the proxy."""
        return f"{uri.partition('?')[0]}?endpoint_override={self.proxy.address}:{self.proxy.port}&scheme=http"

    def restore(self) -> None:
        """Start the nodes that are down, and wait until the head sees exactly these nodes."""
        self.proxy.recover()
        if not self.head.pids():
            self.head.start()
        for node in self.workers:
            if not node.pids():
                node.start(self.head)
        wait_for(
            "all nodes to be alive", lambda: self.alive() == sorted(node.address for node in self.network.nodes), 180
        )

    def alive(self) -> list[str]:
        """Return the sorted addresses of the nodes that the head considers alive."""
        token = self.network.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=20) as reply:
                nodes = json.load(reply)["data"]["result"]["result"]
        except (OSError, KeyError, TypeError):  # not up yet
            return []
        return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")

    def kill_driver(self, script: str) -> None:
        """Send SIGKILL to the head's processes that run a script, that is, to the driver of a job."""
        for pid in self.head.pids():
            with contextlib.suppress(OSError):
                if script.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
