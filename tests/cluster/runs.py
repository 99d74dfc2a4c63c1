"""The run that all tests of this folder make, and what it must have made whatever happened on the way."""

from __future__ import annotations

import subprocess

import pytest
from tiny_runs import NAME, TINY

from vce_ray.storage.store import Store

SCRIPT = "jobs/erase_object.py"
ERASE = [SCRIPT, "deer", *TINY]
STAGES = ("prompts", "unsafe", "captions", "safe", "reference", "pairs", "keep", "evaluation/before")
"""Those that do not depend on trained weights."""
PICTURES = ("tokens", "chosen", "rejected", "image", "chosen_image", "rejected_image")
END_S = 400
"""By when a run has ended, with all that it suffers."""


def part_of(stage: str) -> str:
    """What the paths of a stage's parts have in common."""
    return f"/{NAME}/{stage}/part-"


def finish(job: subprocess.Popen[str], told: str = "report:") -> None:
    """Waits for a job, which must end well and tell of what it made."""
    try:
        printed, _ = job.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"the job does not end:\n{job.communicate()[0][-6000:]}")
    assert job.returncode == 0, printed[-6000:]
    assert told in printed


def assert_same(uri: str, alone: Store, ended: str = "done") -> None:
    """The run in a store has the ids, tokens and pictures of the run on one machine; it has lost no row and written
    none twice."""
    run = Store(uri).child(NAME)
    assert run.read_json("run.json")["status"] == ended
    for name in STAGES:
        ours, theirs = run.stage(name).read(), alone.stage(name).read()
        for column in (ours.column_names[0], *(column for column in PICTURES if column in ours.column_names)):
            assert ours[column].equals(theirs[column]), f"{name} has other values of {column}"
    counts = {name: alone.stage(name).read().num_rows for name in STAGES}
    if ended == "done":
        counts["evaluation/after"] = counts["evaluation/before"]
    for name, expected in counts.items():
        files = [file for file in run.stage(name).store.list() if file.endswith(".parquet")]
        rows = sum(run.stage(name).read_part(file).num_rows for file in files)
        assert rows == run.stage(name).read().num_rows == expected, f"the parts of {name} have {rows} rows"
