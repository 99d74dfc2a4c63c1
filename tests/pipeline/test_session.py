"""A Ray that a command starts is nobody else's."""

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
        environment = os.environ | {"RAY_AUTH_TOKEN": token, "RAY_NUM_REDIS_GET_RETRIES": "3"}  # of 20 seconds, 3
        return subprocess.run([sys.executable, "-c", code, address], env=environment, capture_output=True).returncode
    if "RAY_AUTH_TOKEN" in os.environ:
        print(len(os.environ["RAY_AUTH_TOKEN"]) >= 32, join(os.environ["RAY_AUTH_TOKEN"]), end=" ")
    print(join("another" * 8) != 0)
"""


def told(script: str, **more: str) -> str:
    """The last line that a script prints, in an environment without settings of Ray."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip().splitlines()[-1]


def test_a_ray_that_a_command_starts_wants_its_token() -> None:
    assert told(SCRIPT) == "True 0 True"


def test_a_session_starts_where_ray_was_imported_before_and_wants_a_token_too(tmp_path: Path) -> None:
    assert told("import ray\n" + SCRIPT, HOME=str(tmp_path)) == "True"
