"""A whole run whose captions come from an endpoint."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from chat_server import ChatServer, Response, completion

from vce_ray.config import EMBEDDED
from vce_ray.models.load import base_model
from vce_ray.models.png import from_png
from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration

TOKEN = "the-token-of-this-test"


def erase(store: Path, captioner: str, token: str, *pools: str) -> subprocess.CompletedProcess[str]:
    """Make the pairs of a tiny run whose captions come from an endpoint."""
    sizes = ["--pairs", "4", "--keep", "2", "--steps", "1", "--judged", "2", "--judged-keep", "2", "--batch-size", "3"]
    where = ["--store", str(store), "--name", "a", "--captioner", captioner, *pools, "--pairs-only"]
    environment = os.environ | {"VCE_RAY_CAPTIONER_TOKEN": token, "VCE_RAY_CAPTIONER_DEADLINE_S": "60"}
    command = [sys.executable, "-m", "vce_ray", "erase", "deer", *sizes, *where]
    return subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)


def test_a_run_with_an_endpoint(server: ChatServer, tmp_path: Path) -> None:
    """A wrong token is refused before the run starts. A token that is revoked fails the run, and the right one resumes
    it. The endpoint answers with the embedded model."""
    model = base_model(EMBEDDED)
    lock = threading.Lock()

    def respond(number: int, image: str) -> Response:
        if number != accepted and server.tokens[number] != f"Bearer {TOKEN}":
            return 401, {}, b"wrong token"
        if number % 3 == 2 and len(server.requests) < 5:
            return 503, {}, b"loading"
        with lock:
            return completion(model.caption(from_png([base64.b64decode(image)]))[0][0])

    server.respond, accepted = respond, -1
    for accepted in (-1, 1):  # the second command's first question is accepted, and nothing after it
        refused = erase(tmp_path, server.name, "another-token", "--actors", "1")
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "401" in refused.stderr and "VCE_RAY_CAPTIONER_TOKEN" in refused.stderr
        assert list(tmp_path.iterdir()) == ([] if accepted < 0 else [tmp_path / "a"])
    run = Store(tmp_path).child("a")
    assert run.read_json("run.json")["status"] == "failed" and not run.stage("rejects/captions").parts()
    done = erase(tmp_path, server.name, TOKEN, "--caption-actors", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    captions, unsafe = (run.stage(name).read().to_pylist() for name in ("captions", "unsafe"))
    images = {row["sample_id"]: row["image"] for row in unsafe}
    assert captions
    for row in captions:
        assert row["caption"] == model.caption(from_png([images[row["sample_id"]]]))[0][0]
    assert run.stage("pairs").read().num_rows
    for text in (refused.stdout, refused.stderr, done.stdout, done.stderr, run.read_bytes("run.json").decode()):
        assert TOKEN not in text and "another-token" not in text
