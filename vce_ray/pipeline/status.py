"""Progress of a run, read from its store alone, also while it runs; and the retry of its rejects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vce_ray.errors import UserError
from vce_ray.pipeline.run import RUN_FILE, read_record
from vce_ray.pipeline.stages import NAMES, PAIR_FLOW, StageSpec, downstream, stage
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
            yield _headline(read_record(store, name))
        except (StoreError, UserError) as error:
            yield f"{name}: unreadable ({error})"


def _headline(record: dict[str, Any]) -> str:
    last = next((name for name in reversed(NAMES) if name in record["stages"]), None)
    at = f", {last} {record['stages'][last]['state']}" if last and record["status"] == "running" else ""
    return f"{record['name']}: {record['status']}{at}" + (f" ({record['error']})" if record.get("error") else "")


def _run_lines(store: Store) -> Iterator[str]:
    record = read_record(store)
    yield _headline(record)
    for name, state in record["stages"].items():
        facts = {key: value for key, value in state.items() if key not in ("state", "started")}
        if state["state"] != "done":
            facts |= _so_far(store, stage(name))
        yield f"  {name:<10} {state['state']:<8} " + "  ".join(f"{key} {value}" for key, value in facts.items())


def _so_far(store: Store, spec: StageSpec) -> dict[str, int]:
    """Rows that actors have made of a stage, and rows that they rejected, published or not."""
    if spec.runner != "actors":
        return {}
    rows = sum(store.stage(table).inventory().num_rows for table in spec.tables)
    rejected = store.stage(f"rejects/{spec.name}").inventory().num_rows if spec.rejects else 0
    return {"rows": rows} | ({"rejected": rejected} if rejected else {})


def count_rejects(store: Store) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Return the number of rejected rows by stage and reason, and the stages that a retry of them redoes.

    Of these, rows of images, captions and pairs that succeeded are kept; training and evaluation start again.

    Raises:
        UserError: the run is running, or there is no run here.
    """
    if not store.exists(RUN_FILE):
        raise UserError(f"no run in {store.where()}: give a run's folder, such as runs/deer-vsafe-dpo-0")
    record = read_record(store)
    if record["status"] == "running":
        raise UserError(
            f"run {record['name']} is marked as running: wait for it to end; if its driver was killed, run its "
            "command again first"
        )
    rejects: Counter[tuple[str, str]] = Counter()
    for name in PAIR_FLOW:
        reasons = store.stage(f"rejects/{name}").inventory(["reason"])["reason"].to_pylist()
        rejects.update((name, reason) for reason in reasons)
    affected = downstream({name for name, _ in rejects})
    return rejects, [spec.name for spec in affected if spec.name in record["stages"]]


def retry_rejects(store: Store) -> Counter[tuple[str, str]]:
    """Delete the rejects of a run, and everything computed without the rejected rows, so that its command retries them.

    Returns:
        The number of rows to retry, by stage and reason.

    Raises:
        UserError: as `count_rejects`.
    """
    rejects, _ = count_rejects(store)
    if not rejects:
        return rejects
    record = read_record(store)
    affected = downstream({name for name, _ in rejects})
    # last stages first: if this is interrupted, what is left misses its results and not the rows that led to them
    for spec in reversed(affected):
        for path in spec.invalidated:
            store.delete_prefix(path)
        record["stages"].pop(spec.name, None)
    store.write_json(RUN_FILE, record | {"status": "stopped", "error": "rejects cleared for retry"})
    for spec in affected:  # last: an interrupted call finds its rejects and can be repeated
        if spec.rejects:
            store.delete_prefix(f"rejects/{spec.name}")
    return rejects
