"""The job scripts, submitted with the lines of the docs to a cluster on this machine."""

from __future__ import annotations

import os
import shlex
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
TINY = "--pairs 6 --keep 8 --steps 2 --judged 6 --judged-keep 8"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[dict[str, str]]:
    """Start a head node on loopback and yield the environment for submitting jobs to it; stop it afterwards.

    It starts in the checkout with the environment activated, as `source .venv/bin/activate && ray start --head` does.
    """
    gcs, dashboard = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    # The default port is the same for every Ray on a machine, and an agent that cannot listen takes no jobs.
    command.append(f"--dashboard-agent-listen-port={free_port()}")
    # Not in Ray's default folder, where later tests would find this head and connect to it. The path must be short.
    folder = mkdtemp(prefix="ray-")
    command.append(f"--temp-dir={folder}")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(24)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
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


def ray_job(head: dict[str, str], line: str) -> subprocess.CompletedProcess[str]:
    """Run `ray job` with arguments in the checkout."""
    command = [RAY, "job", *shlex.split(line)]
    return subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "line",
    [
        "--working-dir . jobs/erase_nsfw.py nosuch",
        "--working-dir . -- jobs/erase_nsfw.py nosuch --store runs",
        "--working-dir . -- python jobs/erase_nsfw.py nosuch --store runs",
        "jobs/erase_nsfw.py nosuch",
    ],
)
def test_a_script_starts_with_each_documented_line(head: dict[str, str], line: str) -> None:
    job = ray_job(head, f"submit {line}")
    assert job.returncode == 1 and "exit code 2" in job.stdout + job.stderr
    assert "vce-ray: unknown concept 'nosuch'" in job.stdout


@pytest.mark.parametrize("base", ["--base no/such/base", "--base=no/such/base"])
def test_from_another_base_nudity_and_violence_are_erased_without_another_flag(base: str, tmp_path: Path) -> None:
    command = [sys.executable, "jobs/erase_nsfw.py", *base.split(), "--store", str(tmp_path / "runs")]
    job = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert job.returncode == 2, job.stdout + job.stderr
    lines = job.stdout.splitlines()
    for concept in ("nudity", "violence"):
        assert any(concept in line and "skipped" in line and "no/such/base" in line for line in lines), job.stdout


def test_options_of_a_script_need_two_dashes_before_it(head: dict[str, str]) -> None:
    job = ray_job(head, "submit --working-dir . jobs/erase_nsfw.py --store runs")
    assert job.returncode == 2 and "No such option '--store'" in job.stderr


@pytest.mark.slow
def test_the_shortest_line_runs_and_says_that_ray_deletes_its_store(head: dict[str, str]) -> None:
    started = ray_job(head, "submit --working-dir . --no-wait --submission-id short jobs/erase_nsfw.py")
    assert started.returncode == 0, started.stderr
    deadline = time.monotonic() + 180
    while "[1/9] prompts" not in (log := ray_job(head, "logs short").stdout):
        assert time.monotonic() < deadline and "failed" not in log, log
        time.sleep(1)
    assert log.count("which Ray deletes: give --store s3://") == 1
    ray_job(head, "stop short")


SUBMITTER = """
if ! ray job status again >/dev/null 2>&1; then
    ray job submit --submission-id again --no-wait -- jobs/erase_nsfw.py nosuch
fi
ray job logs --follow again
"""
"""What a submitter of KubeRay runs, in short (BuildJobSubmitCommand in its source)."""


@pytest.mark.slow
def test_a_further_submitter_does_not_start_a_failed_job_again(head: dict[str, str]) -> None:
    """cluster/rayjob.yaml relies on it, and on the message, which KubeRay shows in the status of the job."""
    for _ in range(2):
        submitter = subprocess.run(
            ["bash", "-ec", SUBMITTER], env=head, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert submitter.returncode == 0 and "vce-ray: unknown concept 'nosuch'" in submitter.stdout
    assert ray_job(head, "logs again").stdout.count("Running entrypoint") == 1
    status = ray_job(head, "status again").stdout
    assert "failed with exit code 2" in status and "vce-ray: unknown concept 'nosuch'" in status


@pytest.mark.slow
def test_a_submitted_job_writes_its_report(head: dict[str, str], tmp_path: Path) -> None:
    job = ray_job(head, f"submit --working-dir . -- jobs/erase_object.py deer {TINY} --store {tmp_path}")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "report:" in job.stdout
    run = Store(tmp_path).child("deer-vsafe-dpo-0")
    assert run.read_json("run.json")["status"] == "done"


@pytest.mark.slow
def test_a_job_with_an_unknown_concept_fails_with_a_message(head: dict[str, str], tmp_path: Path) -> None:
    job = ray_job(head, f"submit --working-dir . -- jobs/erase_artists.py openmojy --store {tmp_path}")
    assert job.returncode != 0
    assert "openmoji" in job.stdout and "exit code 2" in job.stdout
