"""The run that all tests of this folder make, and what it must have made whatever happened on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
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
    """The run on this machine, into a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *ERASE, "--store", str(place)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=END_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Store(place).child(NAME)


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
    for name in (*STAGES, "evaluation/after"):
        manifest = run.stage(name).manifest()
        assert manifest is not None, f"{name} is not published"
        ours, theirs = run.stage(name).read(), alone.stage(name).read()
        if name in STAGES:
            for column in (manifest["key"], *(column for column in PICTURES if column in ours.column_names)):
                assert ours[column].equals(theirs[column]), f"{name} has other values of {column}"
        files = [file for file in run.stage(name).store.list() if file.endswith(".parquet")]
        rows = [run.stage(name).read_part(file).num_rows for file in files]
        assert sum(rows) == manifest["rows"] == theirs.num_rows, f"the parts of {name} have {rows} rows"
