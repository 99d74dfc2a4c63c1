"""Retries of rejected rows: puts a run back to where they were rejected, so that its command makes them again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from vce_ray.dataflow.rows import may_change
from vce_ray.pipeline.lease import Lease
from vce_ray.pipeline.run import RUN_FILE, read_record
from vce_ray.pipeline.stages import METRICS_FILE, PAIR_FLOW, REPORT_FILE, downstream
from vce_ray.storage.files import MANIFESTS
from vce_ray.storage.stage import Stage
from vce_ray.storage.store import Store
from vce_ray.training import HISTORY_FILE

PREVIOUS = "previous"
"""Folder of the results that a retry replaces, one folder below it for each retry."""
RESULTS = ("adapter", REPORT_FILE, METRICS_FILE, HISTORY_FILE)
"""What is kept there: files and folders."""


@dataclass(frozen=True)
class Retry:
    """Rejects of a run, by stage and reason, and what a retry of them would do."""

    retried: Counter[tuple[str, str]]
    """Rows to make again."""
    final: Counter[tuple[str, str]]
    """Rows that would be rejected again for the same reason."""
    redone: tuple[str, ...]
    """Stages that have to run again. Of images, captions and log-probs, finished rows are kept."""


def plan_retry(store: Store, every: bool = False) -> Retry:
    """Say what a retry of a run's rejects would do.

    The same images get the same captions from the same model, and the same captions are rejected again. So by default
    only rows that failed for reasons outside of them are retried.

    Args:
        every: retry all rejects, which is worth it if the package or the captioner has changed since.

    Raises:
        UserError: there is no run here, or its record cannot be read.
    """
    record = read_record(store)
    retried: Counter[tuple[str, str]] = Counter()
    final: Counter[tuple[str, str]] = Counter()
    for name in PAIR_FLOW:
        for reason in _rejects(store, name).inventory(["reason"])["reason"].to_pylist():
            (retried if every or may_change(reason) else final)[name, reason] += 1
    affected = downstream({name for name, _ in retried})
    return Retry(retried, final, tuple(spec.name for spec in affected if spec.name in record["stages"]))


def retry_rejects(store: Store, retry: Retry) -> str | None:
    """Clear the rejects that a retry covers, and what was made without these rows, so that the run's command makes it.

    Adapter, report and metrics are copied first, since a new training replaces them.

    Returns:
        Where the copies are, or None if the run had no results.

    Raises:
        UserError: a driver is making the run.
    """
    lease = Lease(store)
    lease.acquire()
    try:
        kept = _keep_results(store)
        affected = downstream({name for name, _ in retry.retried})
        # last stages first: if this is interrupted, what is left misses its results and not the rows that led to them
        for spec in reversed(affected):
            for path in spec.invalidated:
                store.delete_prefix(path)
        record = read_record(store)
        stages = {name: stage for name, stage in record["stages"].items() if name not in {s.name for s in affected}}
        ended = {"status": "stopped", "error": "rejects cleared for retry"}
        store.write_json(RUN_FILE, record | {"stages": stages} | ended)
        for name in {name for name, _ in retry.retried}:  # last: an interrupted call can be repeated
            _drop(_rejects(store, name), {reason for stage, reason in retry.retried if stage == name})
        return kept
    finally:
        lease.release()


def _rejects(store: Store, name: str) -> Stage:
    return store.stage(f"rejects/{name}")


def _keep_results(store: Store) -> str | None:
    """Copy a run's results to a new folder in PREVIOUS, and return where that is."""
    files = [file for path in RESULTS for file in ([path] if store.exists(path) else store.list(path))]
    if not files:
        return None
    number = 1 + max((int(file.split("/")[1]) for file in store.list(PREVIOUS)), default=0)
    for file in files:
        store.write_bytes(f"{PREVIOUS}/{number}/{file}", store.read_bytes(file))
    return store.where(f"{PREVIOUS}/{number}")


def _drop(rejects: Stage, reasons: set[str]) -> None:
    """Unpublish a stage of rejects and remove the rows with these reasons from it."""
    tables = [rejects.read_part(part) for part in rejects.parts()]
    for manifest in MANIFESTS:
        rejects.store.delete_prefix(manifest)
    rest = [row for table in tables for row in table.to_pylist() if row["reason"] not in reasons]
    new = {rejects.write_part(pa.Table.from_pylist(rest, tables[0].schema))} if rest else set()
    for file in rejects.store.list():
        if file not in new:
            rejects.store.delete_prefix(file)
