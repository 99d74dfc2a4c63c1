"""Joins the Ray cluster a job runs on, or starts one on this machine; the one place that calls ray.init."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the driver prints workers' lines already: with the patch they come twice
}
"""Workers tell what went wrong, not that weights are loading."""


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray session for jobs and commands. A cluster named by RAY_ADDRESS (as `ray job submit` sets it) is joined.

    Plain lines instead of progress bars where nobody watches a terminal. A cluster that is started here wants a token,
    made up where the environment has none: Ray's processes listen on all addresses of a machine and run what they are
    sent.
    """
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if os.environ.get("RAY_ADDRESS"):
        options["runtime_env"] = {"env_vars": QUIET}
    else:
        os.environ.update(QUIET)  # its processes inherit them, and those that wait for work already can be used
        # with its dashboard, which Ray Train asks every second whether its controller lives
        options |= {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        if "ray" not in sys.modules:  # it reads these when it is imported; where it was before, it makes its own token
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
            if os.environ["RAY_AUTH_MODE"] == "token" and not named:
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(24)
    import ray
    import ray.data

    ray.init(**options)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
