"""The plan of a whole run: its stages do what a run with these settings does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vce_ray.devices import CARDS
from vce_ray.errors import UserError
from vce_ray.models.families import FAMILIES
from vce_ray.models.shape import SHAPES
from vce_ray.pipeline.plan import RunPlan, captions_itself, plan_run, run_settings
from vce_ray.pipeline.preflight import prepare
from vce_ray.sampling.plan import plan

SHAPE, H200 = SHAPES["janus-pro-7b"], CARDS["h200"].device("bfloat16")


def planned(given: Mapping[str, Any] = {}, gpus: int = 1, captions: bool = True) -> RunPlan:
    config = run_settings("deer", "janus-pro-7b", given)
    return plan_run(config, SHAPE, H200, plan(SHAPE, H200, 64), gpus, captions)


@pytest.mark.parametrize("concept", ["deer", "openmoji", "violence"])
def test_the_settings_are_those_of_a_run(concept: str, tmp_path: Path) -> None:
    given = {"pairs": {"num_keep": 100}, "train": {"steps": 7}} if concept == "deer" else {}
    run = prepare({"concept": concept, "store": str(tmp_path), **given}).config
    ours = run_settings(concept, "emoji-world", given)
    assert (ours.pairs, ours.train, ours.evaluation) == (run.pairs, run.train, run.evaluation)


def test_stages_draw_whole_batches() -> None:
    run, batch_s = planned(), plan(SHAPE, H200, 64).batch_s
    stages = {stage.name: stage for stage in run.stages}
    assert list(stages) == ["unsafe", "captions", "safe", "reference", "training", "evaluation"]
    assert stages["unsafe"].least_s == pytest.approx((192 + 320) / 64 * batch_s)
    assert stages["safe"].least_s == pytest.approx(3 * batch_s + stages["captions"].least_s)
    assert stages["evaluation"].least_s == pytest.approx(41 * batch_s)  # 2 * (500 + 800) / 64, rounded up
    assert stages["training"].expected_s == 80 * run.training.expected_step_s
    assert all(0 < stage.least_s < stage.expected_s for stage in run.stages)
    assert run.expected_s == pytest.approx(sum(stage.expected_s for stage in run.stages))


def test_settings_change_what_they_concern() -> None:
    base = {stage.name: stage.least_s for stage in planned().stages}
    for given, changed in (
        ({"pairs": {"num_pairs": 384}}, {"unsafe", "captions", "safe", "reference"}),
        ({"pairs": {"num_keep": 1280}}, {"unsafe"}),
        ({"train": {"steps": 160}}, {"training"}),
        ({"train": {"prompt_mode": "given"}}, {"reference", "training"}),
        ({"evaluation": {"num_erase": 2000}}, {"evaluation"}),
    ):
        times = {stage.name: stage.least_s for stage in planned(given).stages}
        assert {name for name in times if times[name] != base[name]} == changed


def test_more_gpus_draw_at_once_and_workers_train() -> None:
    one, four = planned(gpus=1), planned(gpus=4)
    faster = {a.name: a.least_s / b.least_s for a, b in zip(one.stages, four.stages, strict=True)}
    assert faster["unsafe"] == 4 and faster["reference"] == pytest.approx(4) and faster["training"] == 1
    assert 3 < faster["evaluation"] <= 4, "41 batches on 4 GPUs take 11 rounds"
    shared = planned({"train": {"num_workers": 4}}, gpus=4)
    assert shared.training.workers == 4 and shared.stages[4].least_s == one.stages[4].least_s / 4
    with pytest.raises(UserError, match="4 --workers need as many GPUs, and --gpus is 2"):
        planned({"train": {"num_workers": 4}}, gpus=2)


def test_captions_of_another_model_are_not_counted() -> None:
    stages = {stage.name: stage for stage in planned(captions=False).stages}
    assert stages["captions"].expected_s == 0 and "another model" in stages["captions"].work
    assert captions_itself("janus-pro-7b") and captions_itself("deepseek-community/Janus-Pro-7B")
    assert captions_itself("emoji-world") and not captions_itself("llamagen-xl-256")
    assert {name.partition("-")[0] for name in SHAPES} == set(FAMILIES), "captions_itself reads the family off the name"


def test_wrong_settings_are_refused() -> None:
    for concept, given, message in (
        ("dear", {}, "unknown concept 'dear'"),
        ("deer", {"train": {"method": "dpo2"}}, "unknown training method 'dpo2'"),
        ("deer", {"pairs": {"num_pairs": 0}}, "num_pairs: input should be greater than or equal to 1, not 0"),
        ("deer", {"train": {"num_workers": 3}}, "batch_size 16 must be a multiple of num_workers 3"),
    ):
        with pytest.raises(UserError, match=message):
            run_settings(concept, "emoji-world", given)
