"""Several Ray nodes on one machine, each in a network namespace of its own, joined by a bridge.

    with Network(environment) as network:
        head, first, second = network.node(), network.node(), network.node()
        head.start(); first.start(head); second.start(head)
        first.kill()                # every process of that node, at once, as when a machine is lost

Needs root and iproute2; `missing()` says what a machine lacks.
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
"""Of the range that is set aside for tests of networks: it collides with none in use."""
OBJECT_STORE_BYTES = 100_000_000
GCS_PORT, DASHBOARD_PORT = 6379, 8265
WORKER = "place=worker"
"""The label of all nodes but the head."""


def missing() -> str | None:
    """What keeps this machine from having network namespaces; None if nothing does."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if which("ip") is None:
        return "network namespaces want `ip` (iproute2)"
    probe = f"vce{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    try:
        bridge = subprocess.run(
            ["ip", "-n", probe, "link", "add", "bridge0", "type", "bridge"], capture_output=True, text=True
        )
        return f"network bridges cannot be made here: {bridge.stderr.strip()}" if bridge.returncode else None
    finally:
        ip("netns", "del", probe)


def ip(*words: str) -> str:
    """Runs `ip`, and returns what it prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


def wait_for(what: str, holds: Callable[[], object], seconds: float) -> None:
    """Waits until something holds. Raises AssertionError, which names it, where it never does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.2)


class Network:
    """A bridge on this machine and the nodes at it. Leaving the context ends and removes all of it."""

    def __init__(self, environment: Mapping[str, str]):
        """`environment` is that of every process of every node."""
        self.environment = dict(environment)
        self.nodes: list[Node] = []

    def __enter__(self) -> Network:
        self.bridge = f"vce{os.getpid()}"
        taken = ip("-4", "-brief", "address", "show")
        self.subnet = next(subnet for subnet in SUBNETS if f" {subnet}." not in taken)
        self.address = f"{self.subnet}.1"
        self.folder = Path(mkdtemp(prefix="vce-"))  # a short path: sockets lie in it
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
        """A further node, not started yet."""
        node = Node(self, len(self.nodes) + 2, cpus)
        self.nodes.append(node)
        node.connect()
        return node


class Node:
    """A namespace with one address, in which a Ray node runs between `start` and `kill`."""

    def __init__(self, network: Network, number: int, cpus: int):
        self.network, self.cpus = network, cpus
        self.name = f"{network.bridge}-{number}"  # of the namespace, and of its cable: 15 letters at most
        self.address = f"{network.subnet}.{number}"
        self.folder = network.folder / str(number)
        self.log = network.folder / f"{number}.log"
        self.started = 0
        self.processes: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        """Makes the namespace and its cable to the bridge."""
        ip("netns", "add", self.name)
        ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.name, "master", self.network.bridge)
        ip("link", "set", self.name, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", self.name, "route", "add", "default", "via", self.network.address)

    def start(self, head: Node | None = None) -> None:
        """Starts a Ray node: a head, or one that joins a head. Returns before it is there."""
        assert not self.pids(), f"{self.name} still runs"
        self.started += 1
        command = [RAY, "start", "--block", f"--node-ip-address={self.address}", f"--num-cpus={self.cpus}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self.folder}{self.started}"]
        if head is None:
            command += ["--head", f"--port={GCS_PORT}", "--disable-usage-stats"]
            command += [f"--dashboard-host={self.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            command += [f"--address={head.address}:{GCS_PORT}", f"--labels={WORKER}"]
        with self.log.open("a") as log:
            self.popen(command, stdout=log, stderr=subprocess.STDOUT)

    def popen(self, command: list[str], **options) -> subprocess.Popen[str]:
        """Starts a process of this node."""
        command = ["ip", "netns", "exec", self.name, *command]
        process = subprocess.Popen(command, env=self.network.environment, text=True, **options)
        self.processes.append(process)
        return process

    def pids(self) -> list[int]:
        """The processes of this node."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Ends all processes of this node as a power cut would: all stand still before the first is gone."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        wait_for(f"the end of {self.name}'s processes", lambda: not self.pids(), 30)

    def remove(self) -> None:
        """Kills the node and takes its namespace away."""
        if self.name in ip("netns", "list"):
            self.kill()
            ip("netns", "del", self.name)
