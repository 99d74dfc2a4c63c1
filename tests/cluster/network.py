"""Several Ray nodes on one machine, each in its own network namespace, connected by a bridge.

    with Network(environment) as network:
        head, first, second = network.node(), network.node(), network.node()
        head.start(); first.start(head); second.start(head)
        first.kill()                # all processes of that node at once, as if the machine failed

Requires root and iproute2; `unsupported()` returns the reason if a machine cannot do this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree, which
from tempfile import mkdtemp

RAY = str(Path(sys.executable).with_name("ray"))
SUBNETS = [f"198.18.{number}" for number in range(256)]
"""In the range reserved for network tests, which no real network uses."""
OBJECT_STORE_BYTES = 100_000_000
GCS_PORT, DASHBOARD_PORT = 6379, 8265
WORKER = "place=worker"
"""Label of all nodes except the head."""


def unsupported() -> str | None:
    """Return why this machine cannot create network namespaces, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces require root"
    if which("ip") is None:
        return "network namespaces require `ip` (iproute2)"
    probe = f"vce{os.getpid()}-probe"
    created = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if created.returncode:
        return f"cannot create network namespaces: {created.stderr.strip()}"
    try:
        bridge = subprocess.run(
            ["ip", "-n", probe, "link", "add", "bridge0", "type", "bridge"], capture_output=True, text=True
        )
        return f"cannot create network bridges: {bridge.stderr.strip()}" if bridge.returncode else None
    finally:
        ip("netns", "del", probe)


def ip(*arguments: str) -> str:
    """Run `ip` and return its output."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Wait until a condition holds. Raises AssertionError that names it if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {seconds:.0f} s waiting for {what}"
        time.sleep(0.2)


class Network:
    """A bridge on this machine and the nodes connected to it. Leaving the context stops and removes all of them."""

    def __init__(self, environment: Mapping[str, str]):
        """Set the environment of every process on every node."""
        self.environment = dict(environment)
        self.nodes: list[Node] = []

    def __enter__(self) -> Network:
        self.bridge = f"vce{os.getpid()}"
        addresses = ip("-4", "-brief", "address", "show")
        self.subnet = next(subnet for subnet in SUBNETS if f" {subnet}." not in addresses)
        self.address = f"{self.subnet}.1"
        self.folder = Path(mkdtemp(prefix="vce-"))  # a short path, because Ray puts sockets there
        ip("link", "add", self.bridge, "type", "bridge")
        try:
            ip("address", "add", f"{self.address}/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.remove()
        ip("link", "del", self.bridge)
        rmtree(self.folder, ignore_errors=True)

    def node(self, cpus: int = 1) -> Node:
        """Add a node, not yet started."""
        node = Node(self, len(self.nodes) + 2, cpus)
        self.nodes.append(node)
        node.connect()
        return node


class Node:
    """A namespace with one address, where a Ray node runs between `start` and `kill`."""

    def __init__(self, network: Network, number: int, cpus: int):
        self.network, self.cpus = network, cpus
        self.name = f"{network.bridge}-{number}"  # of the namespace and its veth device: 15 characters at most
        self.address = f"{network.subnet}.{number}"
        self.folder = network.folder / str(number)
        self.log = network.folder / f"{number}.log"
        self.started = 0
        self.processes: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        """Create the namespace and the veth pair that connects it to the bridge."""
        ip("netns", "add", self.name)
        ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.name, "master", self.network.bridge)
        ip("link", "set", self.name, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", self.name, "route", "add", "default", "via", self.network.address)

    def start(self, head: Node | None = None, hidden: Path | None = None) -> None:
        """Start a Ray node: a head, or a worker that joins one. Returns without waiting for it.

        Args:
            hidden: a folder of this machine that the node sees as empty, as if it were another machine.
        """
        assert not self.pids(), f"{self.name} is still running"
        self.started += 1
        command = [RAY, "start", "--block", f"--node-ip-address={self.address}", f"--num-cpus={self.cpus}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self.folder}{self.started}"]
        if head is None:
            command += ["--head", f"--port={GCS_PORT}", "--disable-usage-stats"]
            command += [f"--dashboard-host={self.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            command += [f"--address={head.address}:{GCS_PORT}", f"--labels={WORKER}"]
        if hidden is not None:
            mount = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, str(hidden), *command]
        with self.log.open("a") as log:
            self.popen(command, stdout=log, stderr=subprocess.STDOUT)

    def popen(self, command: list[str], **options) -> subprocess.Popen[str]:
        """Start a process on this node."""
        command = ["ip", "netns", "exec", self.name, *command]
        process = subprocess.Popen(command, env=self.network.environment, text=True, **options)
        self.processes.append(process)
        return process

    def pids(self) -> list[int]:
        """Return the ids of this node's processes."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Kill all processes of this node as a power cut would: stop all of them before killing the first."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        wait_for(f"the processes of {self.name} to end", lambda: not self.pids(), 30)

    def remove(self) -> None:
        """Kill the node and delete its namespace."""
        if self.name in ip("netns", "list"):
            self.kill()
            ip("netns", "del", self.name)
