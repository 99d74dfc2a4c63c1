"""The lease of a run: one driver at a time makes it, in a folder as in a bucket.

    lease = Lease(store)
    lease.acquire()        # or UserError, which says who makes the run and since when
    ...
    lease.check()          # before every write: raises UserError if another driver has taken the run over
    lease.release()

A lease is a file, lease/<number>.json, that only one driver can create. Its holder renews it while it lives. Whoever
finds the latest one released, or its holder dead, creates the next number; a holder that was only out of reach sees the
higher number and stops.
"""

from __future__ import annotations

import _thread
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from vce_ray.errors import UserError
from vce_ray.storage.errors import StoreError
from vce_ray.storage.store import Store

FOLDER = "lease"
RENEW_S = 10.0
"""Seconds between renewals."""
EXPIRES_S = 60.0
"""Seconds without a renewal after which a holder is dead."""
CLOCKS_S = 600.0
"""A renewal that is this many seconds old by our clock is not waited for: clocks do not differ by so much."""

_held: set[str] = set()
"""Ids of the leases that this process holds. One that it could not give back, as its store had failed, is not held."""
logger = logging.getLogger(__name__)


class Lease:
    """The lease of one run, for this process."""

    def __init__(self, store: Store, log: Callable[[str], None] = print):
        """
        Args:
            store: the run's.
            log: told if it takes a while to see whether another driver lives.

        If the main thread makes this, it is interrupted when the lease is lost.
        """
        self.store, self.log = store, log
        self._number = 0  # of the file that this process holds; 0: none
        self._id = ""
        self._lost: str | None = None
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._in_main = threading.current_thread() is threading.main_thread()

    def acquire(self) -> None:
        """Take the lease, and renew it in a thread from now on.

        Waits for up to `EXPIRES_S` if it is unknown whether the last holder, on another machine, is alive.

        Raises:
            UserError: another driver has it.
        """
        self._lost = None
        self._ended.clear()
        mine = _describe_this_process()
        while not self._number:
            latest = _latest(self.store)
            if latest and (holder := _read(self.store, latest)) and self._alive(latest, holder):
                raise UserError(
                    f"{_who(holder)} has been making the run in {self.store.where()} since {_clock(holder['since'])}: "
                    "wait for it (vce-ray status shows its progress), end it, or use another --name"
                )
            number = latest + 1
            _held.add(mine["id"])  # first: another thread that reads the file must not take its holder for dead
            try:
                self.store.create_json(_path(number), mine)
                if _latest(self.store) == number and _read(self.store, number) == mine:
                    self._number, self._id = number, mine["id"]
                else:  # our listing was old: the number is that of a lease that has been and gone
                    self.store.delete_prefix(_path(number))
            except FileExistsError:
                pass  # another driver was faster
            finally:
                if not self._number:
                    _held.discard(mine["id"])
        for number in _numbers(self.store):
            if number < self._number:
                self.store.delete_prefix(_path(number))
        threading.Thread(target=self._renew, args=(mine,), daemon=True).start()

    def release(self) -> None:
        """Give the lease back, if it is held, so that the next driver need not wait; end an `acquire` that waits."""
        with self._writing:  # a renewal under way must not be written after this
            self._ended.set()
            number, self._number = self._number, 0
            _held.discard(self._id)
            if number and not self._lost:
                holder = _read(self.store, number)
                if holder is not None:
                    self.store.write_json(_path(number), holder | {"released": True})

    @property
    def lost(self) -> str | None:
        """Why this process no longer has the lease that it took, or None."""
        return self._lost

    def check(self) -> None:
        """Raise UserError if the lease was lost since it was acquired."""
        if self._lost:
            raise UserError(self._lost)

    def _alive(self, number: int, holder: dict[str, Any]) -> bool:
        if holder["released"]:
            return False
        if holder["machine"] == _machine():
            return _runs_here(holder)
        if time.time() - holder["renewed"] > CLOCKS_S:
            return False
        # Clocks of machines differ, so what counts is whether the file changes while we look.
        self.log(f"looking for {EXPIRES_S:.0f} s whether {_who(holder)} still makes the run")
        end = time.monotonic() + EXPIRES_S
        while time.monotonic() < end:
            if self._ended.wait(min(1.0, EXPIRES_S / 10)):
                raise UserError(f"interrupted while {_who(holder)} was looked for")
            now = _read(self.store, number)
            if now is None or now["released"]:
                return False  # released, or taken over by another driver, which the caller will find
            if now != holder:
                return True
        return False

    def _renew(self, mine: dict[str, Any]) -> None:
        while not self._ended.wait(RENEW_S):
            with self._writing:
                if self._ended.is_set():
                    return
                try:
                    latest = _latest(self.store)
                    if latest == self._number:
                        self.store.write_json(_path(latest), mine | {"renewed": time.time()})
                        continue
                    holder = _read(self.store, latest) if latest else None
                except StoreError as error:  # the run itself will fail if this lasts
                    logger.warning("the lease of %s could not be renewed: %s", self.store.where(), error)
                    continue
            what = f"was taken over by {_who(holder)}" if holder else "was deleted"
            self._lost = f"the run in {self.store.where()} {what}, so this driver has stopped and written no more to it"
            if self._in_main:
                _thread.interrupt_main()  # it may be waiting for a cluster that works for nothing
            return


def active_driver(store: Store) -> tuple[str, bool] | None:
    """Say who makes the run in a store, and whether it has given a sign of life within `EXPIRES_S`, by our clock.

    None if nobody does, or if a version without leases made the run.
    """
    latest = _latest(store)
    holder = _read(store, latest) if latest else None
    if holder is None or holder["released"]:
        return None
    alive = _runs_here(holder) if holder["machine"] == _machine() else time.time() - holder["renewed"] < EXPIRES_S
    return f"{_who(holder)}, last heard of at {_clock(holder['renewed'])}", alive


def _describe_this_process() -> dict[str, Any]:
    now = time.time()
    return {
        "id": uuid4().hex,
        "host": platform.node(),
        "pid": os.getpid(),
        "machine": _machine(),
        "born": psutil.Process().create_time(),
        "since": now,
        "renewed": now,
        "released": False,
    }


def _machine() -> str:
    """Identify this table of processes: a machine since its last start, or one of its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _runs_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's process runs on this machine; a process that got its number later does not count."""
    try:
        process = psutil.Process(holder["pid"])
        runs = process.create_time() == holder["born"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return runs and (process.pid != os.getpid() or holder["id"] in _held)


def _path(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _numbers(store: Store) -> list[int]:
    return [int(stem) for file in store.list(FOLDER) if (stem := Path(file).stem).isdigit()]


def _latest(store: Store) -> int:
    return max(_numbers(store), default=0)


def _read(store: Store, number: int) -> dict[str, Any] | None:
    """Return a lease, or None if a later holder has removed it."""
    try:
        return store.read_json(_path(number))
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _who(holder: dict[str, Any]) -> str:
    return f"a driver on {holder['host']} (process {holder['pid']})"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
