"""The two arms of an evaluation as steps of a flow: what the base draws, and what runs made of it.

The one place of the evaluation that knows Ray; pictures and verdicts come from score.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import Step, batched, flow, open_claims, publish
from vce_ray.dataflow.task import Task
from vce_ray.pipeline.pair_flow import PICTURE


def arm_step(arm: str, tasks: Mapping[str, Task]) -> Step:
    """The step that draws and judges one arm, 'before' or 'after'."""
    settings = {"tasks": dict(tasks), "arm": arm}
    alike = PICTURE if arm == "before" else ()  # what the base draws is the same for all runs
    source, made, core = "evaluation/prompts", schemas.EVALUATION, "vce_ray.evaluation.score:Score"
    return Step(f"evaluation/{arm}", source, made, "prompt_id", core, settings, alike=alike)


def evaluate_after(tasks: Mapping[str, Task]) -> None:
    """Draws, judges and publishes the after arm of runs whose adapters are trained."""
    step = arm_step("after", tasks)
    run = next(iter(tasks.values())).config
    size = run.sampling.batch_size
    batches = [batch for task in tasks.values() for batch in batched(open_claims(task, step), size)]
    for _ in flow(batches, [([step], run.cluster.draw)], tasks, size, run.cluster.wait_s):
        pass
    for task in tasks.values():
        publish(task, step)
