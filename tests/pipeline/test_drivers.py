"""Drivers as users start, end and kill them: one run, several commands, in a folder and on S3."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from tiny_runs import COMMAND, ENVIRONMENT, NAME

from vce_ray.pipeline.status import status_lines
from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty store."""
    return str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_uri")(f"drivers-{uuid4().hex}")


def start(uri: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--pairs-only", "--store", uri]
    environment = ENVIRONMENT | os.environ  # the S3 server's credentials are set later
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_a_second_driver_leaves_a_run_alone_and_a_dead_one_is_taken_over(uri: str) -> None:
    run = Store(uri).child(NAME)
    first = start(uri)
    wait_until(lambda: bool(run.stage("unsafe").parts()), first)
    second = start(uri)
    _, message = second.communicate(timeout=60)
    assert second.returncode == 2 and "has been making the run" in message, message
    assert run.read_json("run.json")["status"] == "running", "the loser wrote nothing"
    assert "(by a driver on " in next(iter(status_lines(run)))
    first.kill()
    first.communicate(timeout=60)
    assert "no longer alive; its command resumes it" in next(iter(status_lines(run)))
    third = start(uri)
    _, message = third.communicate(timeout=300)
    assert third.returncode == 0, message
    assert run.stage("pairs").published()
    record = run.read_json("run.json")
    assert (record["status"], record["error"]) == ("stopped", "after its pairs, as requested")


SENT = [("folder", signal.SIGTERM), ("s3", signal.SIGTERM), ("folder", signal.SIGHUP), ("folder", signal.SIGINT)]


@pytest.mark.parametrize(("uri", "number"), SENT, indirect=["uri"])
def test_a_driver_that_is_told_to_end_records_that_its_run_stopped(number: signal.Signals, uri: str) -> None:
    run = Store(uri).child(NAME)
    driver = start(uri)
    wait_until(lambda: bool(run.stage("unsafe").parts()), driver)
    driver.send_signal(number)
    _, message = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number
    assert "interrupted; the same command resumes" in message and "Traceback" not in message
    record = run.read_json("run.json")
    assert (record["status"], record["error"]) == ("stopped", f"stopped by {number.name}")
    assert {stage["state"] for stage in record["stages"].values()} == {"done", "stopped"}


@pytest.mark.slow  # known fault: one driver in ten crashes in Ray's shutdown and exits with 1; `stopped` is recorded
def test_a_driver_that_is_told_to_end_while_it_trains_does_so(tmp_path: Path) -> None:
    run = Store(tmp_path).child(NAME)
    command = [*COMMAND, "--steps", "500", "--store", str(tmp_path)]
    driver = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "training" in (run.read_json("run.json")["stages"] if run.exists("run.json") else {}), driver)
    time.sleep(10)  # its workers have started
    driver.terminate()
    _, message = driver.communicate(timeout=60)
    assert driver.returncode == 143 and "Traceback" not in message, message
    assert run.read_json("run.json")["stages"]["training"]["state"] == "stopped"


def test_a_cluster_that_does_not_answer_is_named_and_the_run_has_failed(uri: str) -> None:
    nowhere = ENVIRONMENT | os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    ended = subprocess.run([*COMMAND, "--store", uri], env=nowhere, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "no cluster answers at RAY_ADDRESS (127.0.0.1:1" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    record = Store(uri).child(NAME).read_json("run.json")
    assert record["status"] == "failed" and "RAY_ADDRESS" in record["error"]


def test_settings_may_change_until_something_was_made_with_them(tmp_path: Path) -> None:
    nowhere = ENVIRONMENT | os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    for steps in ("3", "4"):
        command = [*COMMAND, "--steps", steps, "--store", str(tmp_path)]
        ended = subprocess.run(command, env=nowhere, capture_output=True, text=True, timeout=60)
        assert "no cluster answers" in ended.stderr
    assert Store(tmp_path).child(NAME).read_json("run.json")["config"]["train"]["steps"] == 4
