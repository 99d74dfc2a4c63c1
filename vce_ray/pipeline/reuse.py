"""One adapter for several concepts: a run that trains on the pair sets of other runs, in place of new ones.

Its own concept names all of them, such as `names: [openmoji, noto]`. What one of those runs kept and another erases is
kept no more, and a pair whose safe side shows what another run erases is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow import schemas
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.models.load import base_stamp, check_stamp
from vce_ray.pipeline.run import RUN
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

DETERMINING: dict[str, Callable[[RunConfig], Any]] = {
    "base": lambda config: config.base,
    "sampling": lambda config: config.sampling.determining(),
}
"""Settings that pairs depend on."""
_EMPTY = {"unsafe": schemas.UNSAFE, "captions": schemas.CAPTIONS, "safe": schemas.SAFE}
"""Stages that the other runs hold; this one has them without rows."""


def adopt_pairs(task: Task) -> None:
    """Publishes pairs, their reference log-probs and kept images of the runs in `pairs_of` as this run's.

    Raises:
        UserError: a run was made with another base or other sampling, its reference lacks a prompt mode, or nothing of
            its pairs is left.
        StoreError: a run is not there, or its pairs are not published.
    """
    sources = {name: Store(task.config.store).child(name) for name in task.config.pairs_of}
    for name, source in sources.items():
        _check(task, name, source)
    for name, schema in _EMPTY.items():
        stage = task.store.stage(name)
        if not stage.published():
            stage.publish([stage.write_part(schema.empty_table())], key=schema.names[0], adopted=list(sources))
    left_out = 0
    for name in ("reference", "keep", "pairs"):
        stage = task.store.stage(name)
        if stage.published():
            continue
        parts, key = [], ""
        for source in sources.values():
            manifest = source.stage(name).manifest()
            wanted = schemas.reference(task.config.train.prompt_modes).names if name == "reference" else None
            table = source.stage(name).read(columns=wanted)
            assert manifest is not None, "read() has looked for it"
            key = manifest["key"]
            fitting = _fitting(name, table, task.concept)
            left_out += len(table) - len(fitting)
            parts.append(stage.write_part(fitting))
        stamp = base_stamp(task.config.base) if name == "reference" else {}
        manifest = stage.publish(parts, key=key, adopted=list(sources), left_out=left_out, **stamp)
        if name == "pairs" and not manifest["rows"]:
            raise UserError(f"no pair of {', '.join(sources)} is free of what {task.concept.name} erases")
        left_out = 0


def _check(task: Task, name: str, source: Store) -> None:
    theirs, own = RunConfig.model_validate(source.read_json(RUN)["config"]), task.config
    for field, of in DETERMINING.items():
        if of(theirs) != of(own):
            raise UserError(f"run {name} has {field} {of(theirs)}, this run {of(own)}: its pairs do not fit")
    manifest = source.stage("reference").manifest()
    if manifest is None:
        raise UserError(f"run {name} has no pair set yet: run it first, or leave it out of --pairs-of")
    check_stamp(manifest["facts"], base_stamp(task.config.base))
    if missing := [mode for mode in task.config.train.prompt_modes if f"chosen_{mode}" not in manifest["schema"]]:
        raise UserError(f"run {name} has no reference log-probs for prompt mode {missing[0]}: use its own method")


def _fitting(stage: str, table: pa.Table, concept: Concept) -> pa.Table:
    """The rows of a stage that do not contradict a concept."""
    if stage == "reference":
        return table
    columns = ("prompt",) if stage == "keep" else ("refined_caption", "check_caption")
    texts = zip(*(table[column].to_pylist() for column in columns))
    return table.filter(pa.array([not any(map(concept.mentions, row)) for row in texts], pa.bool_()))
