"""One driver at a time: who gets the lease of a run, who is refused, and when a lease is taken over."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vce_ray.errors import UserError
from vce_ray.pipeline import lease as leases
from vce_ray.pipeline.lease import Lease, active_driver
from vce_ray.pipeline.preflight import open_run
from vce_ray.storage.errors import StoreError
from vce_ray.storage.store import Store

ACQUIRE = """
import os, signal, sys
from vce_ray.pipeline.lease import Lease
from vce_ray.storage.store import Store
Lease(Store(sys.argv[1])).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


def latest(store: Store) -> tuple[str, dict[str, Any]]:
    """The path and content of the latest lease."""
    path = store.list("lease")[-1]
    return path, store.read_json(path)


def from_elsewhere(store: Store, **changes: Any) -> None:
    """Make the latest lease that of a driver on another machine."""
    path, holder = latest(store)
    store.write_json(path, holder | {"machine": "another", "host": "elsewhere"} | changes)


def test_a_second_driver_is_refused_and_writes_nothing(store_uri: str) -> None:
    store = Store(store_uri)
    first = Lease(store)
    first.acquire()
    files = {file: store.read_bytes(file) for file in store.list()}
    with pytest.raises(UserError, match=r"a driver on .* \(process \d+\) has been making the run .* since 20"):
        Lease(Store(store_uri)).acquire()
    assert {file: store.read_bytes(file) for file in store.list()} == files
    first.check()
    driver = active_driver(store)
    assert driver is not None and driver[1]
    first.release()
    assert active_driver(store) is None
    second = Lease(store)
    second.acquire()
    assert store.list("lease") == ["lease/000002.json"], "leases do not pile up"
    second.release()


def test_of_many_drivers_at_once_one_gets_the_lease(store_uri: str) -> None:
    def compete(_: int) -> bool:
        try:
            Lease(Store(store_uri)).acquire()
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(compete, range(6))) == 1


def test_a_thread_that_sees_a_lease_before_its_holder_does_is_refused(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    create = Store.create_json

    def create_slowly(self: Store, path: str, value: Any) -> None:
        create(self, path, value)
        with pytest.raises(UserError, match="has been making the run"):
            Lease(Store(tmp_path)).acquire()

    monkeypatch.setattr(Store, "create_json", create_slowly)
    lease = Lease(store)
    lease.acquire()
    assert store.list("lease") == ["lease/000001.json"]
    lease.release()


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(store_uri: str) -> None:
    assert subprocess.run([sys.executable, "-c", ACQUIRE, store_uri]).returncode == -9
    store = Store(store_uri)
    driver = active_driver(store)
    assert driver is not None and not driver[1]
    started = time.monotonic()
    lease = Lease(store)
    lease.acquire()
    assert time.monotonic() - started < leases.RENEW_S
    lease.release()


def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path) -> None:
    store = Store(tmp_path)
    Lease(store).acquire()
    path, holder = latest(store)
    store.write_json(path, holder | {"born": holder["born"] - 100})
    Lease(store).acquire()


def test_a_lease_that_could_not_be_given_back_does_not_keep_its_own_process_out(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    first = Lease(store)
    first.acquire()
    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_json", lambda *_: (_ for _ in ()).throw(StoreError("the store has failed")))
        with pytest.raises(StoreError):
            first.release()
    second = Lease(store)
    second.acquire()
    assert store.list("lease") == ["lease/000002.json"]
    second.release()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew and expire in fractions of a second."""
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    monkeypatch.setattr(leases, "EXPIRES_S", 1.0)


def test_a_driver_elsewhere_that_gives_no_sign_of_life_is_replaced(tmp_path, monkeypatch, quick) -> None:
    store, said = Store(tmp_path), []
    monkeypatch.setattr(leases, "RENEW_S", 600.0)
    Lease(store).acquire()
    from_elsewhere(store)
    lease = Lease(store, said.append)
    lease.acquire()
    assert len(said) == 1 and "elsewhere" in said[0]
    lease.release()


def test_a_driver_elsewhere_that_renews_its_lease_is_left_alone(tmp_path, monkeypatch, quick) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(leases, "RENEW_S", 600.0)
    Lease(store).acquire()
    from_elsewhere(store)
    renewal = threading.Timer(0.4, lambda: from_elsewhere(store, renewed=time.time()))
    renewal.start()
    with pytest.raises(UserError, match="elsewhere"):
        Lease(store, lambda _: None).acquire()
    renewal.join()


def test_an_old_lease_is_not_waited_for(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(leases, "RENEW_S", 600.0)
    Lease(store).acquire()
    from_elsewhere(store, renewed=time.time() - 2 * leases.CLOCKS_S)
    Lease(store, pytest.fail).acquire()


@pytest.mark.parametrize(
    ("happens", "what"),
    [
        (
            lambda store: store.write_json("lease/000002.json", latest(store)[1] | {"host": "elsewhere"}),
            "taken over by",
        ),
        (lambda store: store.delete_prefix("lease"), "was deleted"),
    ],
)
def test_a_driver_whose_lease_is_gone_stops_and_writes_no_more(
    tmp_path, quick, happens: Callable[[Store], None], what: str
) -> None:
    run = open_run({"concept": "deer", "store": str(tmp_path)}, log=lambda _: None)
    run.start()
    record = run.store.read_bytes("run.json")
    with pytest.raises(KeyboardInterrupt):
        happens(run.store)
        time.sleep(5)
    with pytest.raises(UserError, match=f"{what}.*written no more to it"):
        run.finish("failed", "not its own fault")
    assert run.store.read_bytes("run.json") == record


def test_an_interrupt_ends_the_wait_for_a_driver_elsewhere(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(leases, "RENEW_S", 600.0)
    Lease(store).acquire()
    from_elsewhere(store)
    waiting = Lease(store, lambda _: None)
    threading.Timer(0.3, waiting.release).start()
    with pytest.raises(UserError, match="interrupted"):
        waiting.acquire()
    assert len(store.list("lease")) == 1
