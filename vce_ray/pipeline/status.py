"""How far a run is, read from its store alone, from anywhere, also while it runs; and its rejects, tried again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vce_ray.errors import UserError
from vce_ray.pipeline.run import FLOW, RUN, STAGES
from vce_ray.storage.stage import MANIFEST
from vce_ray.storage.store import Store

_PARTS = {name: (name,) for name in FLOW} | {"evaluation": ("evaluation/before", "evaluation/after")}
_AFTER_PAIRS = ("report", "evaluation/metrics.json", "evaluation/after", "adapter", "checkpoints", "training.json")
_FROM_PAIRS = ("pairs", "reference", "training", "evaluation", "report")
"""Stages in run.json that end anew when rows are added to the flow."""


def status_lines(store: Store) -> Iterator[str]:
    """Lines on a run; on each of the runs below a store where it is none itself.

    Raises:
        UserError: there is no run here.
    """
    if store.exists(RUN):
        yield from _run_lines(store)
        return
    names = sorted({file.split("/")[0] for file in store.list() if file.count("/") == 1 and file.endswith(f"/{RUN}")})
    if not names:
        raise UserError(f"no run in {store.where()}: give a run's folder, such as runs/deer-vsafe-dpo-0, or the store")
    for name in names:
        yield _headline(store.read_json(f"{name}/{RUN}"))


def _headline(record: dict[str, Any]) -> str:
    last = next((name for name in reversed(STAGES) if name in record["stages"]), None)
    at = f", {last} {record['stages'][last]['state']}" if last and record["status"] == "running" else ""
    return f"{record['name']}: {record['status']}{at}" + (f" ({record['error']})" if record["error"] else "")


def _run_lines(store: Store) -> Iterator[str]:
    record = store.read_json(RUN)
    yield _headline(record)
    for name, stage in record["stages"].items():
        facts = {key: value for key, value in stage.items() if key not in ("state", "started")}
        if stage["state"] != "done":
            facts |= _so_far(store, name)
        yield f"  {name:<10} {stage['state']:<8} " + "  ".join(f"{key} {value}" for key, value in facts.items())


def _so_far(store: Store, name: str) -> dict[str, int]:
    """Rows that workers have made of a stage and rows that they rejected, published or not."""
    made = sum(store.stage(part).inventory().num_rows for part in _PARTS.get(name, ()))
    rejected = store.stage(f"rejects/{name}").inventory().num_rows if name in FLOW else 0
    return ({"rows": made} if name in _PARTS else {}) | ({"rejected": rejected} if rejected else {})


def retry_rejects(store: Store) -> Counter[tuple[str, str]]:
    """Takes back the rejects of a run, so that the same command tries those rows again and what follows from them.

    Pictures, captions and pairs that came out well stay; the training that was done without the rejected rows, and what
    was judged of it, goes.

    Returns:
        How many rows are tried again, by stage and reason.

    Raises:
        UserError: the run goes on at this moment, or there is no run here.
    """
    if not store.exists(RUN):
        raise UserError(f"no run in {store.where()}: give a run's folder, such as runs/deer-vsafe-dpo-0")
    record = store.read_json(RUN)
    if record["status"] == "running":
        raise UserError(
            f"run {record['name']} says that it is running: wait for its end; if its driver was killed, give its "
            "command again first"
        )
    taken: Counter[tuple[str, str]] = Counter()
    for name in FLOW:
        reasons = store.stage(f"rejects/{name}").inventory(["reason"])["reason"].to_pylist()
        taken.update((name, reason) for reason in reasons)
    if not taken:
        return taken
    first = min(FLOW.index(name) for name, _ in taken)
    for path in (*_AFTER_PAIRS, "pairs", "keep"):
        store.delete_prefix(path)
    for name in FLOW[first:]:
        store.delete_prefix(f"{name}/{MANIFEST}")
    for name in dict.fromkeys((*FLOW[first:], *_FROM_PAIRS)):
        record["stages"].pop(name, None)
    store.write_json(RUN, record | {"status": "stopped", "error": "its rejects are to be tried again"})
    for name in FLOW[first:]:  # last: until here the same call can be given again
        store.delete_prefix(f"rejects/{name}")
    return taken
