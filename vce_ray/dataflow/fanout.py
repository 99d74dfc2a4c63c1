"""Runs rows through steps on Ray Data, in pools of actors that keep models loaded.

What travels is a *row reference*: the run a row belongs to, the stage and part that hold it, its key, and the step that
comes next. Workers fetch rows by reference and write their results before passing references on. So no image passes
through the driver or Ray's object store, pools stream into each other, results of a killed run are not computed again,
and rows of many runs share the same warm actors.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.util

from vce_ray.config import PoolConfig
from vce_ray.dataflow.rows import FAULT, Outcome, Row, reject
from vce_ray.dataflow.schemas import REJECTS, ROW_REF
from vce_ray.dataflow.task import Task
from vce_ray.errors import CaptionerError, UserError
from vce_ray.storage.errors import StoreError
from vce_ray.worker_warnings import mark_warnings

Core = Callable[[list[Row]], Outcome]
DONE, SKIPPED, REJECTED = "done", "skipped", "rejected"
"""Final values of `next`: the last step is done, no further step wants the row, a step rejected it."""
ERROR = "error"
"""Value of `next` for an error that no row is to blame for: `part` names one of ERRORS, or is empty if the actor itself
is of no use, and `key` is its message. Raised in an actor, it would arrive wrapped in Ray's errors and tracebacks."""
ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in (StoreError, CaptionerError)}
TOGETHER = "together"
"""Column that holds a list of row references to process together."""
CACHED_PARTS = 8
"""Parts that a worker keeps in memory: a batch touches few parts."""


@dataclass(frozen=True)
class Step:
    """Reads rows of one stage and makes at most one row of another from each."""

    stage: str
    source: str
    schema: pa.Schema
    """Schema of the result; the first column is the stage's key."""
    link: str
    """Column of a result that holds the key of its source row."""
    core: str
    """Class that does the work, as 'package.module:Class'. Only actors import it: models' libraries take seconds."""
    settings: Mapping[str, Any]
    """Keyword arguments with which an actor constructs the core, once."""
    wants: Callable[[Row], bool] | None = None
    """Which rows of `source` to process; None is all."""
    wants_columns: tuple[str, ...] = ()
    """Columns of `source` that `wants` reads."""
    alike: tuple[str, ...] = ()
    """Columns of `source` that determine the result. Rows that agree in them are processed together, so that runs that
    want the same image draw it once."""
    schemas: Mapping[str, pa.Schema] = field(default_factory=dict)
    """Schemas of single runs that differ from `schema`."""

    def schema_of(self, run: str) -> pa.Schema:
        """Return the schema of a run's results."""
        return self.schemas.get(run, self.schema)


class TooManyRejects(UserError):
    """A stage rejected more rows than `max_reject_ratio` allows."""


class Worker:
    """Actor: constructs the cores of its steps once, then takes batches of row references through those steps."""

    def __init__(self, steps: Sequence[Step], followers: Mapping[str, Step], tasks: Mapping[str, Task]):
        mark_warnings()
        self.steps, self.followers, self.tasks = steps, followers, tasks
        self.cores: dict[str, Core] = {}
        self.unusable = ""
        """Why the cores could not be constructed, such as a model's folder that this node lacks."""
        try:
            self.cores = {step.stage: resolve_name(step.core)(**step.settings) for step in steps}
        except (UserError, StoreError) as error:
            self.unusable = str(error)
        self.cached: OrderedDict[tuple[str, ...], dict[str, Row]] = OrderedDict()

    def __call__(self, batch: pa.Table) -> pa.Table:
        grouped = TOGETHER in batch.schema.names
        refs = [ref for row in batch[TOGETHER].to_pylist() for ref in row] if grouped else batch.to_pylist()
        if self.unusable:
            return pa.Table.from_pylist([refs[0] | {"part": "", "key": self.unusable, "next": ERROR}], ROW_REF)
        for step in self.steps:
            due = [ref for ref in refs if ref["next"] == step.stage]
            if due:
                refs = [ref for ref in refs if ref["next"] != step.stage]
                try:
                    refs += self._apply(step, [self.row(ref) for ref in due])
                except tuple(ERRORS.values()) as error:
                    refs.append(due[0] | {"part": type(error).__name__, "key": str(error), "next": ERROR})
        return pa.Table.from_pylist(refs, ROW_REF)

    def row(self, ref: Row) -> Row:
        """Return the row behind a reference: in memory if this actor made it, else fetched from its part."""
        if "row" in ref:
            return ref["row"]
        place = (ref["run"], ref["stage"], ref["part"])
        if place not in self.cached:
            part = self.tasks[ref["run"]].store.stage(ref["stage"]).read_part(ref["part"])
            key = part.column_names[0]
            self.cached[place] = {row[key]: row for row in part.to_pylist()}
            if len(self.cached) > CACHED_PARTS:
                self.cached.popitem(last=False)
        return self.cached[place][ref["key"]] | {"run": ref["run"], "key": ref["key"]}

    def _apply(self, step: Step, rows: list[Row]) -> list[Row]:
        """Run a step's core on rows, write the results of each run, and return references to them."""
        results, rejects = bisect_failures(self.cores[step.stage], rows, step.stage)
        expected = [(row["run"], row["key"]) for row in rows]
        accounted = [(row["run"], row[step.link]) for row in results]
        accounted += [(row["run"], row["row_id"]) for row in rejects]
        assert sorted(expected) == sorted(accounted), f"step {step.stage} lost or duplicated a row"
        follower = self.followers.get(step.stage)
        refs: list[Row] = []
        for run, task in self.tasks.items():
            if bad := [row for row in rejects if row["run"] == run]:
                part = task.store.stage(f"rejects/{step.stage}").write_part(pa.Table.from_pylist(bad, REJECTS))
                place = {"run": run, "stage": step.stage, "part": part, "next": REJECTED}
                refs += [place | {"key": row["row_id"]} for row in bad]
            if good := [row for row in results if row["run"] == run]:
                part = task.store.stage(step.stage).write_part(pa.Table.from_pylist(good, step.schema_of(run)))
                for row in good:
                    row["key"] = row[step.schema.names[0]]
                    place = {"run": run, "stage": step.stage, "part": part, "key": row["key"], "row": row}
                    refs.append(place | {"next": _next(follower, row)})
        return refs


def _next(follower: Step | None, row: Row) -> str:
    if follower is None:
        return DONE
    return follower.stage if follower.wants is None or follower.wants(row) else SKIPPED


def bisect_failures(core: Core, rows: list[Row], stage: str) -> Outcome:
    """Run `core(rows)`; if it fails, halve the batch until each failing row is rejected alone.

    Errors in ERRORS are raised: no row is to blame for them.
    """
    try:
        return core(rows)
    except tuple(ERRORS.values()):
        raise
    except Exception as error:
        if len(rows) == 1:
            return [], [reject(rows[0], stage, FAULT, f"{type(error).__name__}: {error}")]
    middle = len(rows) // 2
    halves = (bisect_failures(core, half, stage) for half in (rows[:middle], rows[middle:]))
    (results, rejects), (more_results, more_rejects) = halves
    return results + more_results, rejects + more_rejects


# Driver side ----------------------------------------------------------------------------------------------------------


def open_refs(task: Task, step: Step) -> pa.Table:
    """Return references to the rows that a step has yet to process, with a column 'alike' that equal work shares."""
    stage, rejects = task.store.stage(step.stage), task.store.stage(f"rejects/{step.stage}")
    if stage.published():
        return ROW_REF.empty_table().append_column("alike", pa.array([], pa.string()))
    columns = tuple(dict.fromkeys((*step.wants_columns, *step.alike)))
    rows = task.store.stage(step.source).inventory(columns)
    for written, link in ((stage, step.link), (rejects, "row_id")):
        done = written.inventory([link])[link]
        rows = rows.filter(pc.invert(pc.is_in(rows["key"], value_set=done.combine_chunks())))
    if step.wants is not None:
        wanted = [step.wants(row) for row in rows.select(step.wants_columns).to_pylist()]
        rows = rows.filter(pa.array(wanted, pa.bool_()))
    same = [rows[name].cast(pa.string()) for name in step.alike or ("key",)]
    constant = {"run": task.name, "stage": step.source, "next": step.stage}
    refs = {name: pa.repeat(value, len(rows)) for name, value in constant.items()}
    refs |= {"part": rows["part"], "key": rows["key"], "alike": pc.binary_join_element_wise(*same, "\0")}
    return pa.table(refs).select([*ROW_REF.names, "alike"])


def batched(refs: pa.Table, size: int) -> Iterator[pa.Table]:
    """Split references into batches of at most `size` distinct pieces of work, in order of first appearance.

    References that are alike stay together, and runs that come first are served first.
    """
    kinds = refs["alike"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(kinds, kind="stable")
    refs, batch = refs.select(ROW_REF.names).take(pa.array(order)), kinds[order] // size
    starts = np.flatnonzero(np.diff(batch, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(batch)]):
        yield refs.slice(start, end - start).combine_chunks()


def flow(
    batches: Iterable[pa.Table],
    pools: Sequence[tuple[Sequence[Step], PoolConfig]],
    tasks: Mapping[str, Task],
    batch_size: int,
    wait_s: float = 600.0,
    later: Sequence[Step] = (),
) -> Iterator[Row]:
    """Take row references through pools of actors, one after the other. Each comes out once and says where it ended.

    Args:
        batches: references that an actor of the first pool processes together.
        pools: steps that share an actor, and how many actors of what kind.
        batch_size: references that an actor of a later pool processes together.
        wait_s: seconds to wait for the nodes that the pools ask for.
        later: steps outside these pools for which references may come out.

    Raises:
        UserError: the cluster has no room for the pools within `wait_s`, or an actor cannot use a model.
        CaptionerError, StoreError: an actor cannot use its captioner or its store.
    """
    blocks = list(batches)
    if not blocks:
        return
    for _, pool in pools:
        await_nodes(pool, wait_s)
    followers = {step.source: step for steps in (later, *(steps for steps, _ in pools)) for step in steps}
    refs = ray.data.from_blocks([_grouped(block) for block in blocks])  # from_arrow() would start a task per block
    for number, (steps, pool) in enumerate(pools):
        refs = refs.map_batches(
            Worker,
            batch_size=batch_size if number else 1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"steps": list(steps), "followers": followers, "tasks": dict(tasks)},
            **placement(pool, len(pools), len(blocks)),
        )
    yield from results_of(refs)


def _grouped(batch: pa.Table) -> pa.Table:
    """Pack a batch into one row. Ray Data splits and merges rows as it likes when actors hold GPUs, but never a row."""
    refs = batch.combine_chunks().to_struct_array().combine_chunks()
    return pa.table({TOGETHER: pa.ListArray.from_arrays(pa.array([0, len(refs)], pa.int32()), refs)})


def results_of(refs: ray.data.Dataset) -> Iterator[Row]:
    """Yield the references that leave the last pool, as they come. Raises errors that no row is to blame for."""
    for table in refs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for ref in table.to_pylist():
            if ref["next"] == ERROR:
                raise ERRORS.get(ref["part"], UserError)(ref["key"])
            yield ref


def placement(pool: PoolConfig, pools: int, batches: int) -> dict[str, Any]:
    """Return the arguments of map_batches for a pool: number of actors, its bounds, and the resources of each.

    By default a pool gets its share of the cluster's GPUs, or of its CPUs if there are none. More actors than batches
    would only load models.
    """
    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0.0)
    each = min(1.0, gpus / pools) if pool.gpus_per_actor is None else pool.gpus_per_actor
    fitting = int(gpus / each if each else cluster.get("CPU", 1.0)) // pools
    largest = max(1, min(pool.max_actors or max(1, fitting), batches))
    smallest = min(pool.min_actors, largest)
    first = max(smallest, min(largest, fitting))
    options: dict[str, Any] = {"accelerator_type": pool.accelerator} if pool.accelerator else {}
    if pool.labels:
        options["label_selector"] = dict(pool.labels)
    return options | {
        "compute": ray.data.ActorPoolStrategy(min_size=smallest, max_size=largest, initial_size=first),
        "num_cpus": 1 if each else 0.5 / pools,  # without GPUs, leave room for the tasks that feed the actors
        "num_gpus": each,
    }


def await_nodes(pool: PoolConfig, wait_s: float) -> None:
    """Wait until the cluster has room for the fewest actors of a pool. Asking makes an autoscaler start the nodes.

    Raises:
        UserError: there is no room after `wait_s` seconds. The message says what was asked for and what there is.
    """
    request = {"GPU": pool.gpus_per_actor} if pool.gpus_per_actor else {}
    if pool.accelerator:
        request |= {"GPU": pool.gpus_per_actor or 1.0, f"accelerator_type:{pool.accelerator}": 0.001}
    if not request and not pool.labels:
        return  # whatever the cluster has will do
    count = pool.min_actors
    selectors = [dict(pool.labels)] * count
    group = ray.util.placement_group([{"CPU": 1.0} | request] * count, bundle_label_selector=selectors)
    try:
        if group.wait(wait_s):
            return
    finally:
        ray.util.remove_placement_group(group)
    wanted = ", ".join(
        [f"{value:g} {name}" for name, value in request.items()] + [f"{k}={v}" for k, v in pool.labels.items()]
    )
    available = ", ".join(
        f"{value:g} {name}" for name, value in sorted(ray.cluster_resources().items()) if "node:" not in name
    )
    raise UserError(
        f"the cluster had no room for {count} actors with {wanted} each within {wait_s:g} s (it has {available}): "
        "add nodes, ask for less (--actors, --gpus-per-actor, --accelerator, --label), or wait longer (--wait)"
    )


def publish(task: Task, step: Step, max_reject_ratio: float = 1.0, **facts: Any) -> dict[str, Any]:
    """Publish what workers wrote of a stage, its rejects first, and return its manifest. Idempotent.

    Raises:
        TooManyRejects: the share of rejected rows exceeds `max_reject_ratio`. The message names the commonest reasons.
    """
    stage, rejects = task.store.stage(step.stage), task.store.stage(f"rejects/{step.stage}")
    if manifest := stage.manifest():
        return manifest
    reasons = Counter(rejects.inventory(["reason"])["reason"].to_pylist())
    rejected, parts = reasons.total(), stage.parts()
    if rejected and rejected > max_reject_ratio * (total := rejected + stage.inventory().num_rows):
        commonest = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise TooManyRejects(
            f"stage {step.stage} of {task.name} rejected {rejected} of {total} rows, more than max_reject_ratio "
            f"{max_reject_ratio}: {commonest}. Rows that failed for reasons outside of them can be tried again "
            "(`vce-ray retry-rejects`); otherwise change the concept or the settings, under another --name"
        )
    if rejected and not rejects.published():
        rejects.publish(rejects.parts(), key="row_id")
    parts = parts or [stage.write_part(step.schema_of(task.name).empty_table())]
    return stage.publish(parts, key=step.schema.names[0], rejected=rejected, **facts)
