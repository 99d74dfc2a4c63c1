"""Progress of a run, read from its store alone, also while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vce_ray.errors import UserError
from vce_ray.pipeline.lease import active_driver
from vce_ray.pipeline.progress import RowCounts, describe_stage
from vce_ray.pipeline.run import RUN_FILE, read_record
from vce_ray.pipeline.stages import NAMES
from vce_ray.storage.errors import StoreError
from vce_ray.storage.store import Store


def status_lines(store: Store) -> Iterator[str]:
    """Yield lines about a run, or one about each run of a store. A record that cannot be read takes one line there.

    Raises:
        StoreError, UserError: there is no run here, or its record cannot be read.
    """
    if store.exists(RUN_FILE):
        yield from _run_lines(store)
        return
    names = sorted(
        {file.split("/")[0] for file in store.list() if file.count("/") == 1 and file.endswith(f"/{RUN_FILE}")}
    )
    if not names:
        raise UserError(f"no run in {store.where()}: give a run's folder, such as runs/deer-vsafe-dpo-0, or the store")
    for name in names:
        try:
            yield _headline(store.child(name), read_record(store, name))
        except (StoreError, UserError) as error:
            yield f"{name}: unreadable ({error})"


def _headline(store: Store, record: dict[str, Any]) -> str:
    line = f"{record['name']}: {record['status']}"
    if record["status"] != "running":
        return line + (f" ({record['error']})" if record.get("error") else "")
    last = next((name for name in reversed(NAMES) if name in record["stages"]), None)
    line += f", {last} {record['stages'][last]['state']}" if last else ""
    driver = active_driver(store)
    if driver is None:
        return f"{line} (by no driver: its command resumes it)"
    who, alive = driver
    return f"{line} (by {who})" if alive else f"{line} ({who}: no longer alive; its command resumes it)"


def _run_lines(store: Store) -> Iterator[str]:
    record = read_record(store)
    yield _headline(store, record)
    concept, counts = record["concept"].get("name", "the concept"), RowCounts(store)
    counts.look()
    for name, state in record["stages"].items():
        if state["state"] == "done":
            text = f"{state['seconds']:6.1f} s  {describe_stage(name, state, concept)}"
        else:
            progress = counts.progress(name)
            text = f"{progress.done} of {progress.total}  {progress.note}" if progress else ""
        yield f"  {name:<10} {state['state']:<8} {text}".rstrip()
