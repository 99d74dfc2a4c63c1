"""Runs one stage of a run on Ray Data: a pool of actors that hold a model, rows in, published Parquet out.

The workers write the parts and hand back only their names, so no image passes through the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from vce_ray.pairs.generate import Outcome, Row
from vce_ray.schemas import REJECTS
from vce_ray.stage import Stage
from vce_ray.store import Store

Core = Callable[[list[Row]], Outcome]


class RejectedTooMuch(ValueError):
    """A stage rejected more rows than `max_reject_ratio` allows."""


class _Worker:
    """One actor: builds its core once, then turns batches of rows into parts of the stage."""

    def __init__(
        self, core: Callable[..., Core], settings: Mapping[str, Any], schema: pa.Schema, stage: Stage, rejects: Stage
    ):
        self.core, self.schema, self.stage, self.rejects = core(**settings), schema, stage, rejects

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows, rejects = self.core(batch.to_pylist())
        parts = [
            (self.stage.write_part(pa.Table.from_pylist(rows, self.schema)), len(rows), False, ""),
            *(
                (self.rejects.write_part(pa.Table.from_pylist([row], REJECTS)), 1, True, row["reason"])
                for row in rejects
            ),
        ]
        columns = ("part", "rows", "rejected", "reason")
        return pa.table({name: list(values) for name, values in zip(columns, zip(*parts), strict=True)})


def fan_out(
    store: Store,
    name: str,
    schema: pa.Schema,
    source: ray.data.Dataset,
    core: Callable[..., Core],
    settings: Mapping[str, Any],
    batch_size: int,
    num_rows: int,
    max_reject_ratio: float = 1.0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs `core(**settings)` over the source in actors and publishes stage `name`; its manifest is returned.

    The first column of the schema is the key that tells rows apart.
    `num_rows` is about what the source holds: more actors than batches would only load models.
    A stage that is published already is not run again. What a killed run left unpublished is deleted first.

    Raises:
        RejectedTooMuch: the share of rejected rows is above `max_reject_ratio`; the most frequent reasons are named.
    """
    stage, rejects = store.stage(name), store.stage(f"rejects/{name}")
    if manifest := stage.manifest():
        return manifest
    stage.reset()
    store.delete_prefix(f"rejects/{name}")
    gpus = ray.cluster_resources().get("GPU", 0)
    workers = int(gpus or ray.cluster_resources().get("CPU", 1))
    workers = max(1, min(workers, -(-num_rows // batch_size)))
    blocks = source.repartition(target_num_rows_per_block=batch_size)
    parts = blocks.map_batches(
        _Worker,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=workers, max_size=workers),
        num_cpus=1 if gpus else 0.5,  # without GPUs actors must leave a place for the tasks that feed them
        num_gpus=1 if gpus else 0,
        fn_constructor_kwargs={
            "core": core,
            "settings": dict(settings),
            "schema": schema,
            "stage": stage,
            "rejects": rejects,
        },
    ).take_all()
    rejected = [part for part in parts if part["rejected"]]
    made = [part for part in parts if not part["rejected"]]
    total = sum(part["rows"] for part in parts)
    if len(rejected) > max_reject_ratio * total:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in Counter(p["reason"] for p in rejected).most_common(3))
        raise RejectedTooMuch(
            f"stage {name} rejected {len(rejected)} of {total} rows, more than max_reject_ratio {max_reject_ratio}: "
            f"{reasons}. Mend the cause or raise the ratio, then give the same command again"
        )
    if rejected:
        rejects.publish([part["part"] for part in rejected], key="row_id")
    return stage.publish([part["part"] for part in made], key=schema.names[0], rejected=len(rejected), **(facts or {}))
