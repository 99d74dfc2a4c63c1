"""Where captured steps cannot be built: say why, once, and let this process sample with torch's operators.

Triton builds its kernels, and the code that launches them, when they are first used. That takes a C compiler, and a
driver and a GPU that this version of Triton knows.
"""

from __future__ import annotations

import logging
import re
import subprocess
import threading
import traceback

import torch

from vce_ray.env import CAPTURE

logger = logging.getLogger(__name__)

COMPILER = "install a C compiler and Python's headers (apt-get install g++ python3-dev)"
OTHER = "update the GPU's driver, or report this with your versions of torch and triton"
_LAUNCH = re.compile(r"Triton Error \[CUDA\](?!.*(?:kernel image|PTX))", re.DOTALL)
"""Errors of CUDA in running a kernel, such as too little memory. A kernel image or PTX code that a GPU or its driver
does not accept is the fault of building it."""
_given_up = threading.Event()


def given_up() -> bool:
    """Return whether a captured step could not be built in this process."""
    return _given_up.is_set()


def give_up(error: Exception) -> None:
    """Capture no more steps in this process. Logs why, and what to do, the first time.

    Args:
        error: one that `is_build_failure` accepts.
    """
    if _given_up.is_set():
        return
    _given_up.set()
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if isinstance(error, subprocess.CalledProcessError):  # it printed why; the error holds the whole command
        reason = f"{error.cmd[0]} ended with exit code {error.returncode}"
    compiling = isinstance(error, (subprocess.CalledProcessError, OSError)) or "C compiler" in reason
    logger.warning(
        "sampling on this GPU is slower, without captured steps, because they cannot be built (%s): %s, and start "
        "again (%s=0 silences this)",
        reason,
        COMPILER if compiling else OTHER,
        CAPTURE.name,
    )


def is_build_failure(error: Exception) -> bool:
    """Return whether an error means that a captured step cannot be built on this machine.

    It does if Triton is missing, or if Triton raised it, except for errors in running what was built: too little
    memory, or a fault of a kernel, after which a GPU is of no more use to the process.
    """
    if isinstance(error, ImportError):
        return True
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)) or _LAUNCH.match(str(error)):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] == "triton" for module in modules)
