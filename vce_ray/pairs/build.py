"""The pair set of a run, on Ray Data: prompts -> unsafe -> captions -> safe -> pairs, each stage published.

Each function is one stage; it does nothing where the stage is published already.
"""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data.expressions import col

from vce_ray import schemas
from vce_ray.concept import Concept
from vce_ray.config import RunConfig
from vce_ray.fanout import fan_out
from vce_ray.ids import stable_id
from vce_ray.pairs.caption import Describe
from vce_ray.pairs.generate import DrawSafe, DrawUnsafe
from vce_ray.pairs.prompts import erase_prompts, given_prompts, keep_prompts, read_prompts
from vce_ray.stage import Stage
from vce_ray.store import Store


def dataset(stage: Stage, columns: list[str] | None = None) -> ray.data.Dataset:
    """The published parts of a stage as a Ray dataset."""
    return ray.data.read_parquet(stage.paths(), filesystem=stage.store.filesystem, columns=columns)


def publish_prompts(store: Store, run: RunConfig, concept: Concept) -> None:
    """Stage prompts: what is drawn, and with which seeds."""
    stage = store.stage("prompts")
    if stage.published():
        return
    count = run.pairs.num_pairs
    if run.prompts_file is None:
        prompts = erase_prompts(concept, count, run.seed)
    else:
        prompts = given_prompts(concept, read_prompts(run.prompts_file), count, run.seed)
    prompts += keep_prompts(concept, run.pairs.num_keep, run.seed)
    stage.publish([stage.write_part(pa.Table.from_pylist([asdict(p) for p in prompts]))], key="prompt_id")


def draw_unsafe(store: Store, run: RunConfig) -> None:
    """Stage unsafe: an image for each prompt, keep prompts too."""
    settings = {"base": run.base, "sampling": run.sampling}
    source, rows = dataset(store.stage("prompts")), run.pairs.num_pairs + run.pairs.num_keep
    fan_out(store, "unsafe", schemas.UNSAFE, source, DrawUnsafe, settings, run.sampling.batch_size, rows)


def describe(store: Store, run: RunConfig, concept: Concept) -> None:
    """Stage captions: captions of the images that prompts for the concept gave, and the same without the concept."""
    source = dataset(store.stage("unsafe"), ["sample_id", "image", "kind"]).filter(expr=col("kind") == "erase")
    settings = {"reader": run.reader, "concept": concept}
    size, rows, limit = run.sampling.batch_size, run.pairs.num_pairs, run.pairs.max_reject_ratio
    fan_out(store, "captions", schemas.CAPTIONS, source, Describe, settings, size, rows, limit)


def draw_safe(store: Store, run: RunConfig, concept: Concept) -> None:
    """Stage safe: an image for each refined caption, in which a check finds no concept."""
    settings = {
        "base": run.base,
        "reader": run.reader,
        "sampling": run.sampling,
        "concept": concept,
        "attempts": run.pairs.safe_attempts,
    }
    source = dataset(store.stage("captions"), ["sample_id", "refined_caption"])
    size, rows, limit = run.sampling.batch_size, run.pairs.num_pairs, run.pairs.max_reject_ratio
    fan_out(store, "safe", schemas.SAFE, source, DrawSafe, settings, size, rows, limit)


def publish_pairs(store: Store) -> None:
    """Stages keep and pairs: the join of what was drawn before; nothing is drawn here."""
    keep, pairs = store.stage("keep"), store.stage("pairs")
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
            "pair_id": [stable_id(*ids) for ids in zip(sources, safe["sample_id"].to_pylist(), strict=True)],
            "prompt_id": rejected["prompt_id"],
            "prompt": rejected["prompt"],
            "name": rejected["name"],
            "caption": said["caption"],
            "refined_caption": said["refined_caption"],
            "check_caption": safe["check_caption"],
            "rejected_id": rejected["sample_id"],
            "chosen_id": safe["sample_id"],
            "rejected": rejected["tokens"],
            "chosen": safe["tokens"],
            "rejected_image": rejected["image"],
            "chosen_image": safe["image"],
        }
    )
    pairs.publish([pairs.write_part(table)], key="pair_id")


def _rows_of(table: pa.Table, sample_ids: list[str]) -> pa.Table:
    """The rows of these samples, in this order."""
    rows = {sample_id: i for i, sample_id in enumerate(table["sample_id"].to_pylist())}
    return table.take([rows[sample_id] for sample_id in sample_ids])
