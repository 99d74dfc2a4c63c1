"""A fleet's file, settings and members before anything runs. A fleet that runs is in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vce_ray.config import EMBEDDED
from vce_ray.defaults import merged
from vce_ray.evaluation.summary import summary_table, write_summary
from vce_ray.pipeline.erase import erase
from vce_ray.pipeline.fleet import open_fleet, read_fleet
from vce_ray.pipeline.preflight import open_run

SHARED: dict[str, Any] = {"base": EMBEDDED, "seed": 0, "train": {"steps": 7, "method": "vsafe_dpo"}}


def test_a_fleet_file_overrides_flags_and_an_entry_overrides_its_file(tmp_path: Path) -> None:
    path = tmp_path / "artists.yaml"
    path.write_text("seed: 3\ntrain: {steps: 50}\nconcepts: [noto, {concept: twemoji, train: {batch_size: 4}}]\n")
    noto, twemoji, deer = read_fleet([str(path), "deer"], SHARED)
    assert noto == {"base": EMBEDDED, "seed": 3, "concept": "noto", "train": {"steps": 50, "method": "vsafe_dpo"}}
    assert twemoji["train"] == {"steps": 50, "method": "vsafe_dpo", "batch_size": 4}
    assert deer == SHARED | {"concept": "deer"}
    assert SHARED["train"]["steps"] == 7, "shared settings are not modified"
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concepts: []", "concepts must be a list of at least one"),
        ("concepts: [3]", "3 is not a concept"),
        ("concepts: [deer, deer]", "'deer' is in the fleet twice"),
        ("concepts: [deer, {concept: deer, seed: 0}]", "'deer' is in the fleet twice"),
        ("concepts: [", "cannot be read as YAML"),
    ],
)
def test_an_invalid_fleet_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_fleet([str(path)], SHARED)


def test_an_unusable_setting_fails_its_own_run_only(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    settings = [SHARED | {"concept": "deer", "store": str(tmp_path)} | own for own in ({}, {"stepz": 3, "name": "b"})]
    good, bad = open_fleet(settings, lambda name, line: lines.append((name, line)))
    assert good.run is not None and good.error is None
    assert bad.run is None and bad.error == "stepz: unknown setting"
    assert lines == [("deer", f"skipped: {bad.error}")]


def test_runs_that_share_too_little_are_refused(tmp_path: Path) -> None:
    runs = [
        open_run({"concept": "deer", "store": str(tmp_path), "name": name, "sampling": {"guidance_scale": scale}})
        for name, scale in (("a", 2.0), ("b", 3.0))
    ]
    with pytest.raises(ValueError, match="runs a and b share actors and images, but differ in sampling"):
        erase(runs)
    with pytest.raises(ValueError, match="two runs are named a"):
        erase([runs[0], runs[0]])


def test_a_summary_escapes_what_users_wrote() -> None:
    row = {"concept": "<b>", "run": None, "fault": "<script>alert(1)</script>", "figures": None, "stages": {}}
    fleet = {"name": "<i>", "seconds": 60.0, "asked": 10, "drawn": 5, "runs": [row]}
    page = write_summary(fleet)
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert "0 of 1 runs finished" in page and "alert(1)" in page
    assert "failed: <script>" in summary_table(fleet)
