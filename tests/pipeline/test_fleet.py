"""What a fleet's file and options come to, before anything runs; a fleet that runs is in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vce_ray.cli.options import cluster_settings
from vce_ray.concepts.concept import load_concept
from vce_ray.config import ClusterConfig, TrainConfig
from vce_ray.defaults import default_settings, merged
from vce_ray.evaluation.summary import summary_table, write_summary
from vce_ray.pipeline.erase import erase
from vce_ray.pipeline.fleet import open_fleet, read_fleet
from vce_ray.pipeline.run import Run
from vce_ray.run_config import RunConfig

SHARED: dict[str, Any] = {"base": "emoji-world", "seed": 0, "train": {"steps": 7, "method": "vsafe_dpo"}}


def test_a_file_goes_over_options_and_an_entry_over_its_file(tmp_path: Path) -> None:
    path = tmp_path / "artists.yaml"
    path.write_text("seed: 3\ntrain: {steps: 50}\nconcepts: [noto, {concept: twemoji, train: {batch_size: 4}}]\n")
    noto, twemoji, deer = read_fleet([str(path), "deer"], SHARED)
    assert noto == {"base": "emoji-world", "seed": 3, "concept": "noto", "train": {"steps": 50, "method": "vsafe_dpo"}}
    assert twemoji["train"] == {"steps": 50, "method": "vsafe_dpo", "batch_size": 4}
    assert deer == SHARED | {"concept": "deer"}
    assert SHARED["train"]["steps"] == 7  # nothing was written into what holds for all
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}


def test_what_is_not_said_depends_on_kind_and_method(tmp_path: Path) -> None:
    entries = [{"concept": "deer"}, {"concept": "noto"}, {"concept": "noto", "name": "b", "train": {"method": "dpo"}}]
    entries += [
        {"concept": "openmoji"},
        {"concept": "violence", "name": "c", "train": {"beta": 2}, "pairs": {"num_keep": 5}},
    ]
    members = open_fleet([entry | {"store": str(tmp_path)} for entry in entries], lambda *_: None)
    deer, style, vanilla, own, violence = (member.run.config for member in members if member.run)
    plain = TrainConfig()
    assert deer.train == plain and deer.pairs.num_keep == 320
    assert style.train.steps == 80 and style.train.anchor_weight > plain.anchor_weight and style.pairs.num_keep == 1280
    assert vanilla.train.beta < plain.beta and vanilla.pairs == style.pairs, "so that pairs can be shared"
    assert own.train == style.train.model_copy(update=load_concept("openmoji").train), "as its file says"
    large = default_settings("van_gogh", "a/janus")["train"]
    assert large | {"learning_rate": style.train.learning_rate} == default_settings("noto", "emoji-world")["train"]
    of_file = default_settings("openmoji", "emoji-world", "dpo")["train"]
    assert of_file["beta"] == vanilla.train.beta, "what its file says is for the other loss"
    assert large["learning_rate"] < plain.learning_rate, "what suits a small model would tear a large one apart"
    assert violence.train.steps > 200 and violence.train.beta == 2 and violence.pairs.num_keep == 5, "a user's word"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("concepts: []", "concepts is a list of at least one"),
        ("concepts: [3]", "3 is no concept"),
        ("concepts: [deer, deer]", "'deer' stands in the fleet twice"),
        ("concepts: [", "cannot be read as YAML"),
    ],
)
def test_a_fleet_file_that_is_none_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_fleet([str(path)], SHARED)


def test_a_setting_that_is_none_is_the_fault_of_its_own_run(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    settings = [SHARED | {"concept": "deer", "store": str(tmp_path)} | own for own in ({}, {"stepz": 3, "name": "b"})]
    good, bad = open_fleet(settings, lambda name, line: said.append((name, line)))
    assert good.run is not None and good.fault is None
    assert bad.run is None and bad.fault is not None and "stepz" in bad.fault
    assert said == [("deer", f"left out: {bad.fault}")]


def test_runs_that_share_too_little_are_refused(tmp_path: Path) -> None:
    runs = [
        Run(RunConfig(concept="deer", store=str(tmp_path), name=name, sampling={"guidance_scale": scale}))
        for name, scale in (("a", 2.0), ("b", 3.0))
    ]
    with pytest.raises(ValueError, match="runs a and b share actors and pictures, but differ in sampling"):
        erase(runs)
    with pytest.raises(ValueError, match="two runs are named a"):
        erase([runs[0], runs[0]])


def test_a_concept_that_says_something_else_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "whale.yaml"
    path.write_text("{kind: object, names: [whale], keep: [fish]}")
    Run(RunConfig(concept=str(path), store=str(tmp_path)))
    path.write_text("{kind: object, names: [whale], keep: [fish, turtle]}")
    with pytest.raises(ValueError, match="other settings \\(what its concept says\\)"):
        Run(RunConfig(concept=str(path), store=str(tmp_path)))


def test_options_become_pools() -> None:
    made = cluster_settings("2:16", "3", 0.5, "H200", "L4", ["zone=a"], 60)
    cluster = ClusterConfig.model_validate(made)
    assert (cluster.draw.min_actors, cluster.draw.max_actors, cluster.draw.accelerator) == (2, 16, "H200")
    assert cluster.caption is not None and cluster.wait_s == 60
    assert (cluster.caption.min_actors, cluster.caption.max_actors, cluster.caption.accelerator) == (3, 3, "L4")
    assert cluster.draw.labels == {"zone": "a"} and cluster.draw.gpus_per_actor == 0.5
    assert ClusterConfig.model_validate(cluster_settings(None, None, None, None, None, None, 600)) == ClusterConfig()
    for wrong in ("many", "2:", ":3", "-1"):
        with pytest.raises(ValueError, match="give a number of actors"):
            cluster_settings(wrong, None, None, None, None, None, 600)
    with pytest.raises(ValueError, match="label 'zone' is no key=value"):
        cluster_settings(None, None, None, None, None, ["zone"], 600)


def test_a_summary_escapes_what_users_wrote() -> None:
    row = {"concept": "<b>", "run": None, "fault": "<script>alert(1)</script>", "figures": None, "stages": {}}
    fleet = {"name": "<i>", "seconds": 60.0, "asked": 10, "drawn": 5, "runs": [row]}
    page = write_summary(fleet)
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert "0 of 1 concepts erased" in page and "alert(1)" in page
    assert "failed: <script>" in summary_table(fleet)
