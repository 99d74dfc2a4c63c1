"""The run that all tests of this folder make, and the result it must have despite any failures on the way."""

from __future__ import annotations

import subprocess

import pytest
from tiny_runs import NAME, TINY

from vce_ray.storage.store import Store

SCRIPT = "jobs/erase_object.py"
ERASE = [SCRIPT, "deer", *TINY]
STAGES = ("prompts", "unsafe", "captions", "safe", "reference", "pairs", "keep", "evaluation/before")
"""Stages that do not depend on trained weights."""
CONTENT = ("tokens", "chosen", "rejected", "image", "chosen_image", "rejected_image")
TIMEOUT_S = 400
"""Maximum duration of a run, including the injected failures."""


def part_of(stage: str) -> str:
    """Return the common part of the paths of a stage's parts."""
    return f"/{NAME}/{stage}/part-"


def finish(job: subprocess.Popen[str], expected: str = "report:", seconds: float = TIMEOUT_S) -> None:
    """Wait for a job, which must succeed and print `expected`."""
    try:
        output, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"the job did not end within {seconds:.0f} s:\n{job.communicate()[0][-6000:]}")
    assert job.returncode == 0, output[-6000:]
    assert expected in output


def assert_same(uri: str, reference: Store, status: str = "done") -> None:
    """Check that the run in a store has the same ids, tokens and images as an undisturbed run on one machine, without
    lost or duplicate rows."""
    run = Store(uri).child(NAME)
    assert run.read_json("run.json")["status"] == status
    for name in STAGES:
        actual, expected = run.stage(name).read(), reference.stage(name).read()
        for column in (actual.column_names[0], *(column for column in CONTENT if column in actual.column_names)):
            assert actual[column].equals(expected[column]), f"{name} has different values of {column}"
    counts = {name: reference.stage(name).read().num_rows for name in STAGES}
    if status == "done":
        counts["evaluation/after"] = counts["evaluation/before"]
    for name, expected in counts.items():
        files = [file for file in run.stage(name).store.list() if file.endswith(".parquet")]
        rows = sum(run.stage(name).read_part(file).num_rows for file in files)
        assert rows == run.stage(name).read().num_rows == expected, f"the parts of {name} have {rows} rows"
