"""The job scripts, submitted with `ray job submit` to a cluster on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from tempfile import mkdtemp

import pytest

from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
TINY = ["--pairs", "6", "--keep", "8", "--steps", "2", "--judged", "6", "--judged-keep", "8"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[dict[str, str]]:
    """Start a head node on loopback and yield the environment for submitting jobs to it; stop it afterwards."""
    gcs, dashboard = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    # Not in Ray's default folder, where later tests would find this head and connect to it. The path must be short.
    folder = mkdtemp(prefix="ray-")
    command.append(f"--temp-dir={folder}")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(24)}
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        submitter = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        deadline = time.monotonic() + 120
        while subprocess.run([RAY, "job", "list"], env=submitter, capture_output=True, timeout=60).returncode:
            assert process.poll() is None and time.monotonic() < deadline, "the head node does not respond"
        yield submitter
    finally:
        process.terminate()
        process.wait(60)
        rmtree(folder, ignore_errors=True)


def submit(head: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    line = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, *command]
    return subprocess.run(line, env=head, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_submitted_job_writes_its_report(head: dict[str, str], tmp_path: Path) -> None:
    job = submit(head, "jobs/erase_object.py", "deer", *TINY, "--store", str(tmp_path))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "report:" in job.stdout
    run = Store(tmp_path).child("deer-vsafe-dpo-0")
    assert run.read_json("run.json")["status"] == "done"


@pytest.mark.slow
def test_a_job_with_an_unknown_concept_fails_with_a_message(head: dict[str, str], tmp_path: Path) -> None:
    job = submit(head, "jobs/erase_artists.py", "openmojy", "--store", str(tmp_path))
    assert job.returncode != 0
    assert "openmoji" in job.stdout and "exit code 2" in job.stdout
