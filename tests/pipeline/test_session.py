"""Ray started by a command accepts only those who have its token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
from vce_ray.pipeline.session import ray_session
with ray_session():
    import os, ray, subprocess, sys
    address = ray.get_runtime_context().gcs_address
    code = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR')"
    def join(token):
        environment = os.environ | {"RAY_AUTH_TOKEN": token, "RAY_NUM_REDIS_GET_RETRIES": "3"}  # 3 s, not 20
        return subprocess.run([sys.executable, "-c", code, address], env=environment, capture_output=True).returncode
    if "RAY_AUTH_TOKEN" in os.environ:
        print(len(os.environ["RAY_AUTH_TOKEN"]) >= 32, join(os.environ["RAY_AUTH_TOKEN"]), end=" ")
    print(join("another" * 8) != 0)
"""


def last_line(script: str, **more: str) -> str:
    """Run a script in an environment without Ray settings and return the last line it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip().splitlines()[-1]


def test_a_started_ray_requires_its_token() -> None:
    assert last_line(SCRIPT) == "True 0 True"


def test_a_folder_that_ray_cannot_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    script = """
from vce_ray.errors import UserError
from vce_ray.pipeline.session import ray_session
try:
    with ray_session(): pass
except UserError as error:
    print(error)
"""
    message = last_line(script, RAY_TMPDIR=str(tmp_path / "file"))
    assert message.startswith(f"cannot write {tmp_path}/file/ray (Not a directory): set RAY_TMPDIR to a folder with a ")


def test_a_session_that_starts_after_ray_was_imported_requires_a_token_too(tmp_path: Path) -> None:
    assert last_line("import ray\n" + SCRIPT, HOME=str(tmp_path)) == "True"
