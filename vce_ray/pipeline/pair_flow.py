"""The pair sets of runs, on Ray Data: prompts -> unsafe -> captions -> safe -> reference, in one flow.

Runs of a fleet flow together: what several of them want is drawn once, and none waits for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vce_ray.config import PROMPT_MODES, PoolConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import RejectedTooMuch, Step, batched, flow, open_claims, publish
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.models.load import base_stamp
from vce_ray.pairs.captioner import checks_safe_images, parse_captioner
from vce_ray.pairs.prompts import Prompt, erase_prompts, given_prompts, keep_prompts, read_prompts
from vce_ray.pipeline.run import FLOW
from vce_ray.run_config import RunConfig
from vce_ray.storage.stage import Stage
from vce_ray.storage.store import Store

PROMPTS_OF_A_PART = 1024
PICTURE = ("prompt", "seed")
"""What determines a picture of the base."""
UNSAFE, SAFE = "vce_ray.pairs.generate:DrawUnsafe", "vce_ray.pairs.generate:DrawSafe"
DESCRIBE, REFERENCE = "vce_ray.pairs.caption:Describe", "vce_ray.training.reference:Reference"


def publish_prompts(task: Task) -> None:
    """Stage prompts: what is drawn, and with which seeds; nothing where pairs of other runs are taken."""
    stage, run, concept = task.store.stage("prompts"), task.config, task.concept
    if stage.published():
        return
    count = run.pairs.num_pairs
    if run.pairs_of:
        return publish_rows(stage, [])
    if run.prompts_file is None:
        prompts = erase_prompts(concept, count, run.seed)
    else:
        prompts = given_prompts(concept, read_prompts(run.prompts_file), count, run.seed)
    publish_rows(stage, prompts + keep_prompts(concept, run.pairs.num_keep, run.seed))


def publish_rows(stage: Stage, prompts: Sequence[Prompt]) -> None:
    """Publishes prompts in parts of a size that a worker may fetch for a few of their rows."""
    starts = range(0, max(1, len(prompts)), PROMPTS_OF_A_PART)
    shares = [[asdict(row) for row in prompts[i : i + PROMPTS_OF_A_PART]] for i in starts]
    tables = [pa.Table.from_pylist(share, schemas.PROMPTS) for share in shares]
    stage.publish([stage.write_part(table) for table in tables], key="prompt_id")


def pair_steps(tasks: Mapping[str, Task]) -> dict[str, Step]:
    """The steps of the flow by stage. All runs share base, captioner and sampling."""
    run = next(iter(tasks.values())).config
    concepts = {name: task.concept for name, task in tasks.items()}
    drawing = {"base": run.base, "sampling": run.sampling}
    in_vllm = parse_captioner(run.reader).kind == "vllm"
    reading = {"captioner": None if in_vllm else run.reader, "concepts": concepts, "refiner": run.refiner}
    checking = {"captioner": checks_safe_images(run.reader, run.base), "concepts": concepts}
    safe = drawing | checking | {"attempts": run.pairs.safe_attempts}
    modes = {name: task.config.train.prompt_modes for name, task in tasks.items()}
    log_probs = {name: schemas.reference(of_run) for name, of_run in modes.items()}
    referring = {"base": run.base, "modes": modes}
    steps = (
        Step("unsafe", "prompts", schemas.UNSAFE, "prompt_id", UNSAFE, drawing, alike=PICTURE),
        Step("captions", "unsafe", schemas.CAPTIONS, "sample_id", DESCRIBE, reading, _is_to_erase, ("kind",)),
        Step("safe", "captions", schemas.SAFE, "source_id", SAFE, safe),
        Step("reference", "safe", schemas.reference(PROMPT_MODES), "pair_id", REFERENCE, referring, schemas=log_probs),
    )
    return {step.stage: step for step in steps}


def _is_to_erase(row: Mapping[str, Any]) -> bool:
    return row["kind"] == "erase"


def make_pairs(
    tasks: Mapping[str, Task], beside: Step, settled: Callable[[Task, RejectedTooMuch | None], None]
) -> None:
    """Makes and publishes the pair sets of runs.

    Args:
        beside: a further step for the same actors: what the base draws for the evaluation. It comes last.
        settled: called for each run as soon as its pairs are published, or with what keeps them from it.
    """
    steps = pair_steps(tasks)
    every = [*steps.values(), beside]
    claims = {step.stage: pa.concat_tables([open_claims(task, step) for task in tasks.values()]) for step in every}
    waiting = Counter(name for stage in steps for name in claims[stage]["run"].to_pylist())

    def settle(name: str) -> None:
        fault = None
        try:
            publish_pairs(tasks[name], steps)
        except RejectedTooMuch as error:
            fault = error
        settled(tasks[name], fault)

    for name in tasks:
        if not waiting[name]:
            settle(name)
    for claim in _ends(claims, steps, beside, tasks):
        if claim["stage"] in steps:
            waiting[claim["run"]] -= 1
            if not waiting[claim["run"]]:
                settle(claim["run"])
    for task in tasks.values():
        publish(task, beside)


def _ends(
    claims: dict[str, pa.Table], steps: Mapping[str, Step], beside: Step, tasks: Mapping[str, Task]
) -> Iterator[Row]:
    """Takes claims to their ends: all in one flow, or in three where vLLM captions, which wants its GPUs for itself."""
    run = next(iter(tasks.values())).config
    size, wait_s, every = run.sampling.batch_size, run.cluster.wait_s, [*steps.values(), beside]

    def batches(mine: Sequence[Step]) -> list[pa.Table]:
        return [batch for step in mine for batch in batched(claims[step.stage], size)]

    captioner = parse_captioner(run.reader)
    if captioner.kind != "vllm":
        yield from flow(batches(every), _pools(steps, beside, run), tasks, size, wait_s)
        return

    def draw(*mine: Step) -> Iterator[Row]:
        return flow(batches(mine), [(mine, run.cluster.draw)], tasks, size, wait_s, later=every)

    def describe(captions: Step) -> Iterator[Row]:
        from vce_ray.pipeline.vllm import caption_claims

        followers = {step.source: step for step in every}
        pool = run.cluster.caption or PoolConfig()
        return caption_claims(batches([captions]), captions, followers, tasks, captioner.model, pool, wait_s)

    first, last = (steps["unsafe"], beside), (steps["safe"], steps["reference"])
    for through, mine in ((draw, first), (describe, (steps["captions"],)), (draw, last)):
        onward: dict[str, list[Row]] = {}
        for claim in through(*mine):
            if claim["next"] in steps:
                onward.setdefault(claim["next"], []).append(claim)
            else:
                yield claim
        for stage, rows in onward.items():
            table = pa.Table.from_pylist(rows, schemas.CLAIM)
            claims[stage] = pa.concat_tables([claims[stage], table.append_column("alike", table["key"])])


def _pools(steps: Mapping[str, Step], beside: Step, run: RunConfig) -> list[tuple[list[Step], PoolConfig]]:
    """All steps in one pool, whose actors load the base once; or those that draw and those that read apart."""
    cluster, caption = run.cluster, run.cluster.caption
    if caption is None:
        return [([*steps.values(), beside], cluster.draw)]
    if parse_captioner(run.reader).kind == "endpoint":  # its actors only wait for answers
        caption = caption.model_copy(update={"gpus_per_actor": 0.0, "accelerator": None})
    last = [steps["safe"], steps["reference"]]
    return [([steps["unsafe"], beside], cluster.draw), ([steps["captions"]], caption), (last, cluster.draw)]


def publish_pairs(task: Task, steps: Mapping[str, Step]) -> None:
    """Publishes what the flow made of a run, then keep and pairs: the join of it.

    Raises:
        RejectedTooMuch: a stage rejected a larger share of its rows than the run allows.
    """
    limit = task.config.pairs.max_reject_ratio
    for name in FLOW:
        publish(task, steps[name], limit, **(base_stamp(task.config.base) if name == "reference" else {}))
    _join(task.store)


def _join(store: Store) -> None:
    keep, pairs = store.stage("keep"), store.stage("pairs")
    if keep.published() and pairs.published():
        return
    unsafe = store.stage("unsafe").read()
    if not keep.published():
        kept = unsafe.filter(pc.equal(unsafe["kind"], "keep")).select(
            ["sample_id", "prompt", "name", "tokens", "image"]
        )
        keep.publish([keep.write_part(kept)], key="sample_id")
    if pairs.published():
        return
    captions, safe = store.stage("captions").read(), store.stage("safe").read()
    sources = safe["source_id"].to_pylist()
    rejected, said = _rows_of(unsafe, sources), _rows_of(captions, sources)
    table = pa.table(
        {
            "pair_id": safe["pair_id"],
            "prompt_id": rejected["prompt_id"],
            "prompt": safe["prompt"],
            "name": rejected["name"],
            "caption": said["caption"],
            "refined_caption": safe["refined_caption"],
            "check_caption": safe["check_caption"],
            "rejected_id": safe["source_id"],
            "chosen_id": safe["sample_id"],
            "rejected": safe["rejected"],
            "chosen": safe["chosen"],
            "rejected_image": rejected["image"],
            "chosen_image": safe["image"],
        }
    )
    pairs.publish([pairs.write_part(table)], key="pair_id")


def _rows_of(table: pa.Table, sample_ids: list[str]) -> pa.Table:
    """The rows of these samples, in this order."""
    rows = {sample_id: i for i, sample_id in enumerate(table["sample_id"].to_pylist())}
    return table.take([rows[sample_id] for sample_id in sample_ids])
