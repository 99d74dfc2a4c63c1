"""Joins the Ray cluster that a job runs on, or starts one on this machine. The only place that calls ray.init."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vce_ray.errors import UserError, file_problems

CONNECT_S = 5.0
"""Seconds in which a cluster must accept a connection."""
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the driver prints workers' lines already; the patch would print them twice
}
"""Environment of workers: they report errors, but not that weights are loading."""


def session() -> AbstractContextManager[None]:
    """Use the Ray session that is open, or open one with `ray_session`."""
    ray = sys.modules.get("ray")
    return nullcontext() if ray is not None and ray.is_initialized() else ray_session()


@contextmanager
def ray_session() -> Iterator[None]:
    """Open a Ray session for a job or command. Joins the cluster in RAY_ADDRESS, which `ray job submit` sets.

    Progress is printed as plain lines unless standard error is a terminal. A cluster started here requires a token,
    generated unless the environment has one: Ray's processes listen on all addresses of a machine and execute whatever
    they are sent.
    """
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
        options["runtime_env"] = {"env_vars": QUIET}
    else:
        # Set in this process and not as a runtime_env: Ray's processes inherit it, and its prestarted workers can be
        # used, which a runtime_env would exclude.
        os.environ.update(QUIET)
        # Ray Train asks the dashboard every second whether its controller is alive.
        options |= {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        if "ray" not in sys.modules:  # Ray reads these variables on import; imported before, it makes its own token
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
            if os.environ["RAY_AUTH_MODE"] == "token" and not has_token:
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(24)
    import ray
    import ray.data

    on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        with file_problems("set RAY_TMPDIR to a folder with a short path that you may write to"):
            ray.init(**options)
    except (ConnectionError, RuntimeError) as error:  # RuntimeError: other versions of Ray or Python, a wrong token
        if not address:
            raise
        raise UserError(
            f"cannot join the cluster at RAY_ADDRESS: {' '.join(str(error).split())[:300]}; vce-ray doctor says more"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process without a word
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise UserError if nothing listens at an address: Ray would try for minutes and could not be interrupted."""
    if "://" in address:
        raise UserError("RAY_ADDRESS must be host:port of the cluster's head, such as 10.0.0.5:6379, not a URL")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or a scheme that Ray resolves itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"no cluster answers at RAY_ADDRESS ({host.rpartition('@')[2]}:{port}: {error}): start it or correct the "
            "address, or unset RAY_ADDRESS to use this machine"
        ) from error
