"""Reuses pair sets: a run that trains on the pairs of other runs, such as one adapter for several concepts.

Its own concept names all of theirs, such as `names: [openmoji, noto]`. What one of the runs kept and another erases is
not kept, and a pair whose safe image shows what another run erases is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow import schemas
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.models.folder import base_stamp, check_stamp
from vce_ray.pipeline.run import read_record
from vce_ray.pipeline.stages import STAGES
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

DETERMINING: dict[str, Callable[[RunConfig], Any]] = {
    "base": lambda config: config.base,
    "sampling": lambda config: config.sampling.determining(),
}
"""Settings that pairs depend on."""
COPIED = ("reference", "keep", "pairs")
"""Stages to take from the other runs. The stages that lead to them stay empty here."""


def reuse_pairs(task: Task) -> None:
    """Publish pairs, reference log-probs and kept images of the runs in `pairs_of` as this run's own.

    Raises:
        UserError: a run has another base or other sampling, its reference lacks a prompt mode, or no pair is left.
        StoreError: a run is missing, or its pairs are not published.
    """
    sources = {name: Store(task.config.store).child(name) for name in task.config.pairs_of}
    for name, source in sources.items():
        _check(task, name, source)
    for spec in STAGES:
        if spec.rejects and spec.schema is not None and spec.name not in COPIED:
            empty = task.store.stage(spec.name)
            if not empty.published():
                part = empty.write_part(spec.schema.empty_table())
                empty.publish([part], key=spec.schema.names[0], adopted=list(sources))
    for name in COPIED:
        target = task.store.stage(name)
        if target.published():
            continue
        parts, key, left_out = [], "", 0
        for source in sources.values():
            manifest = source.stage(name).manifest()
            columns = schemas.reference(task.config.train.prompt_modes).names if name == "reference" else None
            table = source.stage(name).read(columns=columns)
            assert manifest is not None, "read() has looked for it"
            key = manifest["key"]
            compatible = _compatible(name, table, task.concept)
            left_out += len(table) - len(compatible)
            parts.append(target.write_part(compatible))
        stamp = base_stamp(task.config.base) if name == "reference" else {}
        manifest = target.publish(parts, key=key, adopted=list(sources), left_out=left_out, **stamp)
        if name == "pairs" and not manifest["rows"]:
            raise UserError(f"no pair of {', '.join(sources)} is free of what {task.concept.name} erases")


def _check(task: Task, name: str, source: Store) -> None:
    theirs, own = RunConfig.from_record(read_record(source)["config"]), task.config
    for field, of in DETERMINING.items():
        if of(theirs) != of(own):
            raise UserError(
                f"run {name} was made with {field} {of(theirs)}, this run uses {of(own)}: its pairs cannot be reused"
            )
    manifest = source.stage("reference").manifest()
    if manifest is None:
        raise UserError(f"run {name} has no pair set yet: run it first, or leave it out of --pairs-of")
    check_stamp(manifest["facts"], base_stamp(task.config.base))
    if missing := [mode for mode in task.config.train.prompt_modes if f"chosen_{mode}" not in manifest["schema"]]:
        raise UserError(
            f"run {name} has no reference log-probs for prompt mode {missing[0]}: use a training method and a prompt "
            "mode that it has"
        )


def _compatible(stage: str, table: pa.Table, concept: Concept) -> pa.Table:
    """Return the rows of a stage that do not mention what the concept erases."""
    if stage == "reference":
        return table
    columns = ("prompt",) if stage == "keep" else ("refined_caption", "check_caption")
    texts = zip(*(table[column].to_pylist() for column in columns))
    return table.filter(pa.array([not any(map(concept.mentions, row)) for row in texts], pa.bool_()))
