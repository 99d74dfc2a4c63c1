"""Rows through steps on Ray Data: pools of actors that hold models, published Parquet as memory.

What travels is a claim: the run a row belongs to, the stage and part in which it lies, its key, and the step that comes
next. Workers fetch rows by their claims and write what they make of them before they pass claims on. So no picture
passes through the driver or Ray's object store, pools stream into each other, what was made before a kill is not made
again, and rows of many runs share the same warm actors.
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
from vce_ray.dataflow.rows import Outcome, Row, reject
from vce_ray.dataflow.schemas import CLAIM, REJECTS
from vce_ray.dataflow.task import Task
from vce_ray.errors import CaptionerError, UserError
from vce_ray.storage.errors import StoreError

Core = Callable[[list[Row]], Outcome]
DONE, ENDED, REJECTED = "done", "ended", "rejected"
"""In place of a next step: the last step is behind the row, no step wants it any more, or a step rejected it."""
FAULT = "fault"
"""In place of a next step: no row is to blame. The part says which of FAULTS it is, the key what it says: raised in an
actor, it would come wrapped in Ray's own errors and tracebacks."""
FAULTS: dict[str, type[Exception]] = {error.__name__: error for error in (StoreError, CaptionerError)}
TOGETHER = "together"
"""The column of claims that are to be taken together."""
FETCHED_PARTS = 8
"""Parts that a worker remembers: the rows of a batch lie in few."""


@dataclass(frozen=True)
class Step:
    """Reads rows of one stage and makes rows of another, one or none of each."""

    stage: str
    source: str
    schema: pa.Schema
    """Of what is made; the first column is the stage's key."""
    link: str
    """The column of a made row that holds the key of the row which it was made of."""
    core: str
    """The class of what is done, 'package.module:Class': only actors import models' libraries, which takes seconds."""
    settings: Mapping[str, Any]
    """With which an actor builds the core, once."""
    wants: Callable[[Row], bool] | None = None
    """Which rows of `source` are for this step; all of them where it is None."""
    asks: tuple[str, ...] = ()
    """Columns of `source` that `wants` looks at."""
    alike: tuple[str, ...] = ()
    """Columns of `source` that determine what is made of a row, where several runs may want the same of it."""
    schemas: Mapping[str, pa.Schema] = field(default_factory=dict)
    """In place of `schema`, of runs that want columns of their own."""

    def schema_of(self, run: str) -> pa.Schema:
        """The schema of what is made for a run."""
        return self.schemas.get(run, self.schema)


class RejectedTooMuch(UserError):
    """A stage rejected more rows than `max_reject_ratio` allows."""


class Worker:
    """An actor: builds the cores of its steps once, then takes batches of claims through those steps."""

    def __init__(self, steps: Sequence[Step], followers: Mapping[str, Step], tasks: Mapping[str, Task]):
        self.steps, self.followers, self.tasks = steps, followers, tasks
        self.cores: dict[str, Core] = {step.stage: resolve_name(step.core)(**step.settings) for step in steps}
        self.fetched: OrderedDict[tuple[str, ...], dict[str, Row]] = OrderedDict()

    def __call__(self, batch: pa.Table) -> pa.Table:
        folded = TOGETHER in batch.schema.names
        claims = [claim for row in batch[TOGETHER].to_pylist() for claim in row] if folded else batch.to_pylist()
        for step in self.steps:
            mine = [claim for claim in claims if claim["next"] == step.stage]
            if mine:
                claims = [claim for claim in claims if claim["next"] != step.stage]
                try:
                    claims += self._apply(step, [self.row(claim) for claim in mine])
                except tuple(FAULTS.values()) as error:
                    claims.append(mine[0] | {"part": type(error).__name__, "key": str(error), "next": FAULT})
        return pa.Table.from_pylist(claims, CLAIM)

    def row(self, claim: Row) -> Row:
        """The row that a claim stands for: at hand where this actor made it, or fetched."""
        if "row" in claim:
            return claim["row"]
        place = (claim["run"], claim["stage"], claim["part"])
        if place not in self.fetched:
            part = self.tasks[claim["run"]].store.stage(claim["stage"]).read_part(claim["part"])
            key = part.column_names[0]
            self.fetched[place] = {row[key]: row for row in part.to_pylist()}
            if len(self.fetched) > FETCHED_PARTS:
                self.fetched.popitem(last=False)
        return self.fetched[place][claim["key"]] | {"run": claim["run"], "key": claim["key"]}

    def _apply(self, step: Step, rows: list[Row]) -> list[Row]:
        """Makes what a step makes of rows, writes it for each run, and returns claims to it."""
        made, rejects = _carefully(self.cores[step.stage], rows, step.stage)
        given = [(row["run"], row["key"]) for row in rows]
        taken = [(row["run"], row[step.link]) for row in made] + [(row["run"], row["row_id"]) for row in rejects]
        assert sorted(given) == sorted(taken), f"step {step.stage} has lost or doubled a row"
        follower = self.followers.get(step.stage)
        claims: list[Row] = []
        for run, task in self.tasks.items():
            if bad := [row for row in rejects if row["run"] == run]:
                part = task.store.stage(f"rejects/{step.stage}").write_part(pa.Table.from_pylist(bad, REJECTS))
                told = {"run": run, "stage": step.stage, "part": part, "next": REJECTED}
                claims += [told | {"key": row["row_id"]} for row in bad]
            if good := [row for row in made if row["run"] == run]:
                part = task.store.stage(step.stage).write_part(pa.Table.from_pylist(good, step.schema_of(run)))
                for row in good:
                    row["key"] = row[step.schema.names[0]]
                    told = {"run": run, "stage": step.stage, "part": part, "key": row["key"], "row": row}
                    claims.append(told | {"next": _next(follower, row)})
        return claims


def _next(follower: Step | None, row: Row) -> str:
    if follower is None:
        return DONE
    return follower.stage if follower.wants is None or follower.wants(row) else ENDED


def _carefully(core: Core, rows: list[Row], stage: str) -> Outcome:
    """`core(rows)`; where it fails, by halves, so that a row which cannot be done is rejected alone."""
    try:
        return core(rows)
    except tuple(FAULTS.values()):
        raise  # no row's fault
    except Exception as error:
        if len(rows) == 1:
            return [], [reject(rows[0], stage, "fault", f"{type(error).__name__}: {error}")]
    middle = len(rows) // 2
    (made, rejects), (more, others) = (_carefully(core, half, stage) for half in (rows[:middle], rows[middle:]))
    return made + more, rejects + others


# What the driver does -------------------------------------------------------------------------------------------------


def open_claims(task: Task, step: Step) -> pa.Table:
    """Claims to the rows that a step has still to read, and 'alike': what claims to the same picture have in common."""
    stage, rejects = task.store.stage(step.stage), task.store.stage(f"rejects/{step.stage}")
    if stage.published():
        return CLAIM.empty_table().append_column("alike", pa.array([], pa.string()))
    columns = tuple(dict.fromkeys((*step.asks, *step.alike)))
    rows = task.store.stage(step.source).inventory(columns)
    for made, link in ((stage, step.link), (rejects, "row_id")):
        done = made.inventory([link])[link]
        rows = rows.filter(pc.invert(pc.is_in(rows["key"], value_set=done.combine_chunks())))
    if step.wants is not None:
        rows = rows.filter(pa.array([step.wants(row) for row in rows.select(step.asks).to_pylist()], pa.bool_()))
    same = [rows[name].cast(pa.string()) for name in step.alike or ("key",)]
    told = {"run": task.name, "stage": step.source, "next": step.stage}
    claims = {name: pa.repeat(value, len(rows)) for name, value in told.items()}
    claims |= {"part": rows["part"], "key": rows["key"], "alike": pc.binary_join_element_wise(*same, "\0")}
    return pa.table(claims).select([*CLAIM.names, "alike"])


def batched(claims: pa.Table, size: int) -> Iterator[pa.Table]:
    """Claims in batches of at most `size` kinds, in their order: runs that come first have all their rows first. Those
    that are alike, a drawing that several runs want, are together."""
    kinds = claims["alike"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(kinds, kind="stable")
    claims, batch = claims.select(CLAIM.names).take(pa.array(order)), kinds[order] // size
    starts = np.flatnonzero(np.diff(batch, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(batch)]):
        yield claims.slice(start, end - start).combine_chunks()


def flow(
    batches: Iterable[pa.Table],
    pools: Sequence[tuple[Sequence[Step], PoolConfig]],
    tasks: Mapping[str, Task],
    batch_size: int,
    wait_s: float = 600.0,
    later: Sequence[Step] = (),
) -> Iterator[Row]:
    """Takes claims through pools of actors, one after the other; each claim comes out once, and tells where it ended.

    Args:
        batches: claims that an actor of the first pool takes together.
        pools: steps that share an actor, and how many actors of what kind.
        batch_size: claims that an actor of a later pool takes together.
        wait_s: how long what the pools ask for may take to come.
        later: steps that are not in these pools, for which claims may come out.

    Raises:
        UserError: it has not come.
        CaptionerError, StoreError: an actor cannot use its captioner or its store.
    """
    blocks = list(batches)
    if not blocks:
        return
    for _, pool in pools:
        await_nodes(pool, wait_s)
    followers = {step.source: step for steps in (later, *(steps for steps, _ in pools)) for step in steps}
    claims = ray.data.from_blocks([_folded(block) for block in blocks])  # from_arrow() starts a task for each
    for number, (steps, pool) in enumerate(pools):
        claims = claims.map_batches(
            Worker,
            batch_size=batch_size if number else 1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"steps": list(steps), "followers": followers, "tasks": dict(tasks)},
            **placement(pool, len(pools), len(blocks)),
        )
    yield from ends(claims)


def _folded(batch: pa.Table) -> pa.Table:
    """Claims as one row of Ray Data, which joins and parts rows as it likes where an actor holds a GPU."""
    claims = batch.combine_chunks().to_struct_array().combine_chunks()
    return pa.table({TOGETHER: pa.ListArray.from_arrays(pa.array([0, len(claims)], pa.int32()), claims)})


def ends(claims: ray.data.Dataset) -> Iterator[Row]:
    """The claims that come out of the last pool, as they come. Raises what an actor met that is no row's fault."""
    for table in claims.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for claim in table.to_pylist():
            if claim["next"] == FAULT:
                raise FAULTS[claim["part"]](claim["key"])
            yield claim


def placement(pool: PoolConfig, pools: int, batches: int) -> dict[str, Any]:
    """What a pool asks of Ray Data: how many actors, between which bounds, and what each of them holds.

    Without settings a pool has its share of the cluster's GPUs, or of its CPUs where there are none. More actors than
    batches would only load models.
    """
    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0.0)
    each = min(1.0, gpus / pools) if pool.gpus_per_actor is None else pool.gpus_per_actor
    fitting = int(gpus / each if each else cluster.get("CPU", 1.0)) // pools
    largest = max(1, min(pool.max_actors or max(1, fitting), batches))
    smallest = min(pool.min_actors, largest)
    first = max(smallest, min(largest, fitting))
    chosen: dict[str, Any] = {"accelerator_type": pool.accelerator} if pool.accelerator else {}
    if pool.labels:
        chosen["label_selector"] = dict(pool.labels)
    return chosen | {
        "compute": ray.data.ActorPoolStrategy(min_size=smallest, max_size=largest, initial_size=first),
        "num_cpus": 1 if each else 0.5 / pools,  # without GPUs actors must leave a place for the tasks that feed them
        "num_gpus": each,
    }


def await_nodes(pool: PoolConfig, wait_s: float) -> None:
    """Waits until the cluster has a place for the fewest actors of a pool; asking makes an autoscaler bring it.

    Raises:
        UserError: it has none after so many seconds; told are what was asked for and what is there.
    """
    asked = {"GPU": pool.gpus_per_actor} if pool.gpus_per_actor else {}
    if pool.accelerator:
        asked |= {"GPU": pool.gpus_per_actor or 1.0, f"accelerator_type:{pool.accelerator}": 0.001}
    if not asked and not pool.labels:
        return  # what the cluster has will do
    count = pool.min_actors
    selectors = [dict(pool.labels)] * count
    group = ray.util.placement_group([{"CPU": 1.0} | asked] * count, bundle_label_selector=selectors)
    try:
        if group.wait(wait_s):
            return
    finally:
        ray.util.remove_placement_group(group)
    wanted = ", ".join(
        [f"{value:g} {name}" for name, value in asked.items()] + [f"{k}={v}" for k, v in pool.labels.items()]
    )
    there = ", ".join(
        f"{value:g} {name}" for name, value in sorted(ray.cluster_resources().items()) if "node:" not in name
    )
    raise UserError(
        f"the cluster had no place for {count} actors with {wanted} each within {wait_s:g} s (it has {there}): "
        "add nodes, ask for less (--actors, --gpus-per-actor, --accelerator, --label), or wait longer (--wait)"
    )


def publish(task: Task, step: Step, max_reject_ratio: float = 1.0, **facts: Any) -> dict[str, Any]:
    """Publishes what workers wrote of a stage, its rejects first, and returns its manifest; once, however often called.

    Raises:
        RejectedTooMuch: the share of rejected rows is above `max_reject_ratio`; the most frequent reasons are named.
    """
    stage, rejects = task.store.stage(step.stage), task.store.stage(f"rejects/{step.stage}")
    if manifest := stage.manifest():
        return manifest
    reasons = Counter(rejects.inventory(["reason"])["reason"].to_pylist())
    rejected, parts = reasons.total(), stage.parts()
    if rejected and rejected > max_reject_ratio * (total := rejected + stage.inventory().num_rows):
        told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise RejectedTooMuch(
            f"stage {step.stage} of {task.name} rejected {rejected} of {total} rows, more than max_reject_ratio "
            f"{max_reject_ratio}: {told}. Mend the cause, take the rejects back by vce-ray retry-rejects, then give "
            "the same command again"
        )
    if rejected and not rejects.published():
        rejects.publish(rejects.parts(), key="row_id")
    parts = parts or [stage.write_part(step.schema_of(task.name).empty_table())]
    return stage.publish(parts, key=step.schema.names[0], rejected=rejected, **facts)
