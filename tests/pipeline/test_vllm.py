"""vLLM's real engine on a CPU, with a tiny Qwen-VL of random weights, captions pictures of the embedded model.

Such weights describe nothing, so nearly all rows end as rejects. Each of them must come out, with its reason.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

from vce_ray.pipeline.run import Run
from vce_ray.run_config import RunConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
REASONS = {
    "captioner failed",
    "captioner refused",
    "caption cut off",
    "caption too long",
    "concept not in unsafe image",
    "empty caption",
    "nothing left of the caption",
}


def test_pictures_of_the_embedded_model_go_through_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_qwen import make_tiny_qwen

    from vce_ray.evaluation.prompts import evaluation_prompts
    from vce_ray.pipeline.before_after import arm_step
    from vce_ray.pipeline.pair_flow import make_pairs, publish_prompts, publish_rows
    from vce_ray.pipeline.session import ray_session

    model = make_tiny_qwen(tmp_path / "qwen")
    settings: dict[str, Any] = {
        "pairs": {"num_pairs": 6, "num_keep": 2},
        "evaluation": {"num_erase": 2, "num_keep": 2},
        "captioner": f"vllm:{model}",
    }
    run = Run(RunConfig(concept="deer", store=str(tmp_path / "runs"), **settings))
    publish_prompts(run.task)
    publish_rows(run.store.stage("evaluation/prompts"), evaluation_prompts(run.config, run.concept))
    faults = []
    began = time.monotonic()
    with ray_session():
        make_pairs({run.name: run.task}, arm_step("before", {run.name: run.task}), lambda _, f: faults.append(f))
    with capsys.disabled():
        print(f"\nvLLM: six pictures drawn and captioned in {time.monotonic() - began:.0f} s")
    unsafe = run.store.stage("unsafe").inventory(["kind"])
    asked_for = {row["key"] for row in unsafe.to_pylist() if row["kind"] == "erase"}
    described = set(run.store.stage("captions").inventory()["key"].to_pylist())
    rejects = run.store.stage("rejects/captions").inventory(["row_id", "reason", "detail"]).to_pylist()
    assert len(asked_for) == 6 and described | {row["row_id"] for row in rejects} == asked_for
    assert len(described) + len(rejects) == 6
    assert {row["reason"] for row in rejects} <= REASONS, rejects
    failed = [row for row in rejects if row["reason"] == "captioner failed"]
    assert not failed, failed
    assert any(row["detail"] for row in rejects)  # the engine did say something
    if len(rejects) > 3:  # what a run does with so many
        assert "rejected" in str(faults[0])
