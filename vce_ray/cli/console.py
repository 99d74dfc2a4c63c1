"""Separates what a driver says from what its libraries print: the latter goes to a log file.

    with quiet_session(store, runs, console): ...     # a Ray session whose output lies in the store's logs/

Ray prints hundreds of lines in a run that goes well. Warnings of this package are among them, possibly from workers on
other machines; these are repeated on the console.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vce_ray.storage.errors import StoreError
from vce_ray.storage.local_folder import temporary_folder
from vce_ray.worker_warnings import find_warning, mark_warnings

if TYPE_CHECKING:
    from vce_ray.pipeline.run import Run
    from vce_ray.storage.store import Store

FOLDER = "logs"
LOOK_S = 0.5
"""Seconds between looks for warnings in the log."""


def own_output() -> TextIO:
    """Return a stream to standard output that stays there while `redirected` is in force."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by an object in memory
        return sys.stdout
    if descriptor != 1:
        return sys.stdout
    sys.stdout.flush()
    return os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace", buffering=1)


@contextmanager
def redirected(file: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Send all output of this process and of those that it starts to a file.

    Args:
        warn: called from a thread with each different warning of this package in the file.
    """
    mark_warnings()
    kept = os.dup(1), os.dup(2)
    with file.open("a") as log:
        _flush()
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        ended = threading.Event()
        watch = threading.Thread(target=_repeat_warnings, args=(file, warn, ended), daemon=True)
        watch.start()
        try:
            yield
        finally:
            _flush()
            ended.set()
            watch.join()
            for descriptor, copy in enumerate(kept, start=1):
                os.dup2(copy, descriptor)
                os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _repeat_warnings(file: Path, warn: Callable[[str], None], ended: threading.Event) -> None:
    seen: set[str] = set()
    with file.open(encoding="utf-8", errors="replace") as log:
        last = False
        while not last:
            last = ended.wait(LOOK_S)  # and one more look at what was written before the end
            for line in log:
                if (warning := find_warning(line)) and warning not in seen:
                    seen.add(warning)
                    warn(warning)


@contextmanager
def quiet_session(store: Store, runs: Sequence[Run], warn: Callable[[str], None]) -> Iterator[None]:
    """Open a Ray session whose output lies in the logs of a store; the runs' records say where.

    Args:
        store: of the run or the fleet.
        warn: called with each warning of this package, and with the log's place if the session ends in an error.
    """
    from vce_ray.pipeline.session import session

    name = f"{FOLDER}/{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}.log"
    # A thread that calls Ray while the session ends would start a cluster of its own; Ray reads this on import.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    with temporary_folder() as folder:
        file = folder / "log" if store.in_bucket else Path(store.root, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        for run in runs:
            run.record["log"] = store.where(name)
        try:
            with redirected(file, warn), session():
                yield
        except Exception:
            if file.stat().st_size:
                warn(f"what Ray and its workers printed is in {store.where(name)}")
            raise
        finally:
            if store.in_bucket:
                _upload(file, store, name, warn)


def _upload(file: Path, store: Store, name: str, warn: Callable[[str], None]) -> None:
    try:
        store.write_bytes(name, file.read_bytes())
    except StoreError as error:
        with tempfile.NamedTemporaryFile(prefix="vce_ray-", suffix=".log", delete=False) as kept:
            kept.write(file.read_bytes())
        warn(f"the log could not be written to the store and is kept in {kept.name} ({error})")
