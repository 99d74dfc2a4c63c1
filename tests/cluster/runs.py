"""The run that all tests of this folder make, and what it must have made whatever happened on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from network import wait_for
from nodes import ROOT

from vce_ray.store import Store

TINY = ["--pairs", "6", "--keep", "8", "--steps", "2", "--judged", "8", "--judged-keep", "12", "--batch-size", "2"]
SCRIPT = "jobs/erase_object.py"
ERASE = [SCRIPT, "deer", *TINY]
NAME = "deer-vsafe-dpo-0"
STAGES = ("prompts", "unsafe", "captions", "safe", "reference", "pairs", "keep", "evaluation/before")
"""Those that do not depend on trained weights."""
PICTURES = ("tokens", "chosen", "rejected", "image", "chosen_image", "rejected_image")
END_S = 400
"""By when a run has ended, with all that it suffers."""


def part_of(stage: str) -> str:
    """What the paths of a stage's parts have in common."""
    return f"/{NAME}/{stage}/part-"


def run_alone(place: Path) -> Store:
    """The run on this machine, into a folder, as far as it does not depend on trained weights."""
    run = Store(place).child(NAME)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *ERASE, "--store", str(place)]
    with (place / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        ended = lambda: job.poll() is not None or all(run.stage(name).published() for name in STAGES)
        wait_for("a run on one machine", ended, END_S)
        assert job.returncode in (None, 0), (place / "log").read_text()
    finally:
        job.kill()
        job.wait()
    return run


def finish(job: subprocess.Popen[str]) -> None:
    """Waits for a job, which must end well."""
    try:
        printed, _ = job.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"the job does not end:\n{job.communicate()[0][-6000:]}")
    assert job.returncode == 0, printed[-6000:]
    assert "report:" in printed


def assert_same(uri: str, alone: Store) -> None:
    """The run in a store has the ids, tokens and pictures of the run on one machine; it has lost no row and written
    none twice."""
    run = Store(uri).child(NAME)
    assert run.read_json("run.json")["status"] == "done"
    for name in STAGES:
        ours, theirs = run.stage(name).read(), alone.stage(name).read()
        for column in (ours.column_names[0], *(column for column in PICTURES if column in ours.column_names)):
            assert ours[column].equals(theirs[column]), f"{name} has other values of {column}"
    counts = {name: alone.stage(name).read().num_rows for name in STAGES}
    counts["evaluation/after"] = counts["evaluation/before"]
    for name, expected in counts.items():
        files = [file for file in run.stage(name).store.list() if file.endswith(".parquet")]
        rows = sum(run.stage(name).read_part(file).num_rows for file in files)
        assert rows == run.stage(name).read().num_rows == expected, f"the parts of {name} have {rows} rows"
