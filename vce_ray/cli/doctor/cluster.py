"""Checks that this machine can join the cluster in RAY_ADDRESS, if that is set."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from vce_ray.cli.doctor.check import Asked, Check

_JOIN = """
from vce_ray.pipeline.session import ray_session
try:
    with ray_session(): pass
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    raise SystemExit(1)
"""


def check(_: Asked) -> Iterator[Check]:
    """Check the cluster."""
    if (address := os.environ.get("RAY_ADDRESS", "")) not in ("", "local"):
        yield check_cluster(address)


def check_cluster(address: str, timeout_s: float = 20.0) -> Check:
    """Check that this machine can join the cluster at RAY_ADDRESS, which requires the same versions of Ray and Python.

    Joins in a subprocess: where something else than Ray listens, joining takes minutes and cannot be interrupted.
    """
    command, environment = [sys.executable, "-c", _JOIN], os.environ | {"RAY_ADDRESS": address}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return interpret_join(address, f"no response within {timeout_s:g} s")
    return interpret_join(address, done.stdout or f"Ray exited with {done.returncode}" if done.returncode else "")


def interpret_join(address: str, error: str) -> Check:
    """Return the check for an attempt to join a cluster; `error` is Ray's message, empty on success."""
    shown = address.rpartition("@")[2]  # without credentials
    error = " ".join(error.replace(address, shown).split())
    local = f"Ray {metadata.version('ray')} and Python {platform.python_version()}"
    if not error:
        return Check("cluster", True, f"{shown} runs {local}, as this machine does")
    if remote := re.search(r"cluster was started with: Ray: (\S+) Python: (\S+)", error):
        found = f"{shown} runs Ray {remote[1]} and Python {remote[2]}, this machine has {local}"
        fix = f"install ray=={remote[1]} and Python {remote[2]} here, or submit the run with `ray job submit`"
        return Check("cluster", False, found, fix)
    fix = "set RAY_ADDRESS to host:port of the cluster's head and RAY_AUTH_TOKEN to its token, or unset RAY_ADDRESS"
    return Check("cluster", False, f"cannot join {shown}: {error[:300]}", fix)
