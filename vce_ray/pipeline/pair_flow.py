"""Pair sets of runs on Ray Data: prompts -> unsafe -> captions -> safe -> reference, in one flow.

Runs of a fleet flow together: an image that several of them need is drawn once, and none waits for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from vce_ray.config import PoolConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import Step, TooManyRejects, batched, flow, open_refs, publish
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.models.folder import base_stamp
from vce_ray.pairs.build import join_pairs, keep_images
from vce_ray.pairs.captioner import parse_captioner, safe_image_captioner
from vce_ray.pairs.prompts import Prompt
from vce_ray.pipeline.stages import PAIR_FLOW, stage
from vce_ray.run_config import RunConfig
from vce_ray.storage.stage import Stage
from vce_ray.storage.store import Store

PROMPTS_PER_PART = 1024
"""Small enough that a worker may fetch a part for a few of its rows."""
IMAGE = ("prompt", "seed")
"""Columns that determine an image of the base."""


def publish_prompts(target: Stage, prompts: Callable[[], Sequence[Prompt]], **facts: Any) -> None:
    """Publish a stage of prompts, with facts about it, unless it is published already."""
    if target.published():
        return
    rows = [asdict(prompt) for prompt in prompts()]
    starts = range(0, max(1, len(rows)), PROMPTS_PER_PART)
    tables = [pa.Table.from_pylist(rows[start : start + PROMPTS_PER_PART], schemas.PROMPTS) for start in starts]
    target.publish([target.write_part(table) for table in tables], key="prompt_id", **facts)


def pair_steps(tasks: Mapping[str, Task]) -> dict[str, Step]:
    """Return the steps of the flow by stage. All runs share base, captioner and sampling."""
    run = next(iter(tasks.values())).config
    concepts = {name: task.concept for name, task in tasks.items()}
    in_vllm = parse_captioner(run.captioning_model).kind == "vllm"  # then the engine answers and rows bring answers
    captioner = None if in_vllm else run.captioning_model
    checker = safe_image_captioner(run.captioning_model, run.base)
    modes = {name: task.config.train.prompt_modes for name, task in tasks.items()}
    unsafe = _step(
        "unsafe", "vce_ray.pairs.generate:DrawUnsafe", "prompt_id", base=run.base, sampling=run.sampling, alike=IMAGE
    )
    captions = _step(
        "captions",
        "vce_ray.pairs.caption:Describe",
        "sample_id",
        captioner=captioner,
        concepts=concepts,
        refiner=run.refiner,
        base=run.base,
        wants=_is_to_erase,
        wants_columns=("kind",),
    )
    safe = _step(
        "safe",
        "vce_ray.pairs.generate:DrawSafe",
        "source_id",
        base=run.base,
        captioner=checker,
        sampling=run.sampling,
        concepts=concepts,
        attempts=run.pairs.safe_attempts,
    )
    reference = _step(
        "reference",
        "vce_ray.training.reference:Reference",
        "pair_id",
        base=run.base,
        modes=modes,
        schemas={name: schemas.reference(of_run) for name, of_run in modes.items()},
    )
    return {step.stage: step for step in (unsafe, captions, safe, reference)}


def _step(
    name: str,
    core: str,
    link: str,
    *,
    alike: tuple[str, ...] = (),
    wants: Callable[[Row], bool] | None = None,
    wants_columns: tuple[str, ...] = (),
    schemas: Mapping[str, pa.Schema] | None = None,
    **settings: Any,
) -> Step:
    """Return the step of a stage in the table of stages; `settings` go to its core."""
    spec = stage(name)
    assert spec.schema is not None, f"{name} is a stage of actors"
    return Step(name, spec.inputs[0], spec.schema, link, core, settings, wants, wants_columns, alike, schemas or {})


def _is_to_erase(row: Mapping[str, Any]) -> bool:
    return row["kind"] == "erase"


def make_pairs(
    tasks: Mapping[str, Task], evaluation: Step, on_ready: Callable[[Task, TooManyRejects | None], None]
) -> None:
    """Make and publish the pair sets of runs.

    Args:
        evaluation: one more step for the same actors, which runs last: what the base draws for the evaluation.
        on_ready: called for each run as soon as its pairs are published, or with the error that prevents it.
    """
    steps = pair_steps(tasks)
    every = [*steps.values(), evaluation]
    refs = {step.stage: pa.concat_tables([open_refs(task, step) for task in tasks.values()]) for step in every}
    waiting = Counter(name for stage in steps for name in refs[stage]["run"].to_pylist())

    def finish(name: str) -> None:
        failure = None
        try:
            publish_pairs(tasks[name], steps)
        except TooManyRejects as error:
            failure = error
        on_ready(tasks[name], failure)

    for name in tasks:
        if not waiting[name]:
            finish(name)
    for ref in _finished_refs(refs, steps, evaluation, tasks):
        if ref["stage"] in steps:
            waiting[ref["run"]] -= 1
            if not waiting[ref["run"]]:
                finish(ref["run"])
    for task in tasks.values():
        publish(task, evaluation)


def _finished_refs(
    refs: dict[str, pa.Table], steps: Mapping[str, Step], evaluation: Step, tasks: Mapping[str, Task]
) -> Iterator[Row]:
    """Take row references to their ends: in one flow, or in three if vLLM captions, which needs its GPUs for itself."""
    run = next(iter(tasks.values())).config
    size, wait_s, every = run.sampling.batch_size, run.cluster.wait_s, [*steps.values(), evaluation]

    def batches(of: Sequence[Step]) -> list[pa.Table]:
        return [batch for step in of for batch in batched(refs[step.stage], size)]

    captioner = parse_captioner(run.captioning_model)
    if captioner.kind != "vllm":
        yield from flow(batches(every), _pools(steps, evaluation, run), tasks, size, wait_s)
        return

    def draw(*of: Step) -> Iterator[Row]:
        return flow(batches(of), [(of, run.cluster.draw)], tasks, size, wait_s, later=every)

    def describe(captions: Step) -> Iterator[Row]:
        from vce_ray.pipeline.vllm import caption_refs

        followers = {step.source: step for step in every}
        pool = run.cluster.caption or PoolConfig()
        return caption_refs(batches([captions]), captions, followers, tasks, captioner.model, pool, wait_s)

    first, last = (steps["unsafe"], evaluation), (steps["safe"], steps["reference"])
    for run_flow, of in ((draw, first), (describe, (steps["captions"],)), (draw, last)):
        onward: dict[str, list[Row]] = {}
        for ref in run_flow(*of):
            if ref["next"] in steps:
                onward.setdefault(ref["next"], []).append(ref)
            else:
                yield ref
        for name, rows in onward.items():
            table = pa.Table.from_pylist(rows, schemas.ROW_REF)
            refs[name] = pa.concat_tables([refs[name], table.append_column("alike", table["key"])])


def _pools(steps: Mapping[str, Step], evaluation: Step, run: RunConfig) -> list[tuple[list[Step], PoolConfig]]:
    """Return one pool for all steps, whose actors load the base once, or separate pools to draw and to caption."""
    cluster, caption = run.cluster, run.cluster.caption
    if caption is None:
        return [([*steps.values(), evaluation], cluster.draw)]
    if parse_captioner(run.captioning_model).kind == "endpoint":  # its actors only wait for answers
        caption = caption.model_copy(update={"gpus_per_actor": 0.0, "accelerator": None})
    last = [steps["safe"], steps["reference"]]
    return [([steps["unsafe"], evaluation], cluster.draw), ([steps["captions"]], caption), (last, cluster.draw)]


def publish_pairs(task: Task, steps: Mapping[str, Step]) -> None:
    """Publish the flow's stages of a run, then `keep` and `pairs`, which join them.

    Raises:
        TooManyRejects: a stage rejected a larger share of its rows than the run allows.
    """
    limit = task.config.pairs.max_reject_ratio
    for name in PAIR_FLOW:
        publish(task, steps[name], limit, **(base_stamp(task.config.base) if name == "reference" else {}))
    _publish_joined(task.store)


def _publish_joined(store: Store) -> None:
    keep, pairs = store.stage("keep"), store.stage("pairs")
    if keep.published() and pairs.published():
        return
    unsafe = store.stage("unsafe").read()
    if not keep.published():
        keep.publish([keep.write_part(keep_images(unsafe))], key="sample_id")
    if not pairs.published():
        table = join_pairs(unsafe, store.stage("captions").read(), store.stage("safe").read())
        pairs.publish([pairs.write_part(table)], key="pair_id")
