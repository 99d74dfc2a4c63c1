"""Evaluation on Ray Data: the images before (drawn by the base) and after (drawn with the adapters of the runs).

The images and their rows come from `vce_ray.evaluation`, which knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import Step, batched, flow, open_refs, publish
from vce_ray.dataflow.task import Task
from vce_ray.evaluation.detectors import evaluation_schema
from vce_ray.pipeline.pair_flow import IMAGE
from vce_ray.storage.store import Store


def evaluation_step(arm: str, tasks: Mapping[str, Task]) -> Step:
    """Return the step that draws the images of one arm, 'before' or 'after', and runs the detectors on them."""
    return Step(
        stage=f"evaluation/{arm}",
        source="evaluation/prompts",
        schema=schemas.EVALUATION,
        link="prompt_id",
        core="vce_ray.evaluation.draw_and_detect:DrawAndDetect",
        settings={"tasks": dict(tasks), "arm": arm},
        alike=IMAGE if arm == "before" else (),  # runs share images of the base, but not those of their adapters
        schemas={name: _schema(arm, task) for name, task in tasks.items()},
    )


def _schema(arm: str, task: Task) -> pa.Schema:
    """Return the columns that a run writes: all, or those with which an earlier version began.

    Parts with other columns could not be published together.
    """
    schema, stage = evaluation_schema(task.config, task.concept), task.store.stage(f"evaluation/{arm}")
    begun = [] if stage.published() else stage.parts()
    if not begun:
        return schema
    written = stage.read_part(begun[0]).column_names
    return pa.schema([field for field in schema if field.name in written])


def evaluate_after(tasks: Mapping[str, Task]) -> None:
    """Draw, evaluate and publish the images after, for runs whose adapters are trained."""
    step = evaluation_step("after", tasks)
    config = next(iter(tasks.values())).config
    size = config.sampling.batch_size
    batches = [batch for task in tasks.values() for batch in batched(open_refs(task, step), size)]
    for _ in flow(batches, [([step], config.cluster.draw)], tasks, size, config.cluster.wait_s):
        pass
    for task in tasks.values():
        publish(task, step)


def read_before_after(store: Store, columns: Sequence[str]) -> pa.Table:
    """Return the published evaluation rows of a run, before and after.

    Args:
        store: the store of the run.
        columns: columns of `evaluation_schema` to read. Those of a detector that did not exist when the run was
            evaluated are left out, and so are metrics that need them.
    """
    stages = [store.stage(f"evaluation/{arm}") for arm in schemas.BEFORE_AFTER]
    manifests = [stage.manifest() for stage in stages]
    published = [name for name in columns if all(name in manifest["schema"] for manifest in manifests if manifest)]
    return pa.concat_tables([stage.read(columns=published) for stage in stages])
