"""vLLM's real engine on a CPU captions images of the embedded model, with a tiny Qwen2-VL of random weights.

Its captions are meaningless, so nearly all rows are rejected. Every row must come out, captioned or with a reason.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.integration,
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
    "refined caption is no prompt",
}


def test_images_of_the_embedded_model_go_through_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_qwen import make_tiny_qwen

    from vce_ray.evaluation.prompts import evaluation_prompts
    from vce_ray.pairs.build import run_prompts
    from vce_ray.pipeline.before_after import evaluation_step
    from vce_ray.pipeline.pair_flow import make_pairs, publish_prompts
    from vce_ray.pipeline.preflight import prepare
    from vce_ray.pipeline.session import ray_session

    model = make_tiny_qwen(tmp_path / "qwen")
    settings: dict[str, Any] = {
        "concept": "deer",
        "store": str(tmp_path / "runs"),
        "pairs": {"num_pairs": 6, "num_keep": 2},
        "evaluation": {"num_erase": 2, "num_keep": 2},
        "captioner": f"vllm:{model}",
    }
    task = prepare(settings)
    publish_prompts(task.store.stage("prompts"), lambda: run_prompts(task.config, task.concept))
    publish_prompts(task.store.stage("evaluation/prompts"), lambda: evaluation_prompts(task.config, task.concept))
    failures = []
    started = time.monotonic()
    with ray_session():
        tasks = {task.name: task}
        make_pairs(tasks, evaluation_step("before", tasks), lambda _, failure: failures.append(failure))
    with capsys.disabled():
        print(f"\nvLLM: six images drawn and captioned in {time.monotonic() - started:.0f} s")
    unsafe = task.store.stage("unsafe").inventory(["kind"])
    drawn = {row["key"] for row in unsafe.to_pylist() if row["kind"] == "erase"}
    captioned = set(task.store.stage("captions").inventory()["key"].to_pylist())
    rejects = task.store.stage("rejects/captions").inventory(["row_id", "reason", "detail"]).to_pylist()
    assert len(drawn) == 6 and captioned | {row["row_id"] for row in rejects} == drawn
    assert len(captioned) + len(rejects) == 6
    assert {row["reason"] for row in rejects} <= REASONS, rejects
    failed = [row for row in rejects if row["reason"] == "captioner failed"]
    assert not failed, failed
    assert any(row["detail"] for row in rejects)  # the engine did generate text
    if len(rejects) > 3:  # more than max_reject_ratio allows
        assert "rejected" in str(failures[0])
