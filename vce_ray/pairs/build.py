"""First and last step of a pair set: the prompts of a run, and its `keep` and `pairs` tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from vce_ray.concepts.concept import Concept
from vce_ray.pairs.prompt_file import describe_use, read_own_prompts
from vce_ray.pairs.prompts import Prompt, erase_prompts, given_prompts, keep_prompts
from vce_ray.run_config import RunConfig


def run_prompts(config: RunConfig, concept: Concept, log: Callable[[str], None] = lambda line: None) -> list[Prompt]:
    """Return all prompts that a run draws, erase prompts first; none if it trains on the pairs of other runs.

    Args:
        log: takes a line about the use of the prompts file, if there is one.

    Raises:
        UserError: the prompts file is invalid, or the concept has no neighbours to keep.
    """
    if config.pairs_of:
        return []
    own = read_own_prompts(config)
    if own is None:
        erase = erase_prompts(concept, config.pairs.num_pairs, config.seed)
    else:
        log(describe_use(own, concept, config.pairs.num_pairs))
        erase = given_prompts(concept, own.prompts, config.pairs.num_pairs, config.seed)
    return erase + keep_prompts(concept, config.pairs.num_keep, config.seed)


def keep_images(unsafe: pa.Table) -> pa.Table:
    """Return the `keep` table: the images that were drawn from keep prompts."""
    columns = ["sample_id", "prompt", "name", "tokens", "image"]
    return unsafe.filter(pc.equal(unsafe["kind"], "keep")).select(columns)


def join_pairs(unsafe: pa.Table, captions: pa.Table, safe: pa.Table) -> pa.Table:
    """Join the stages of a flow into the `pairs` table, one row for each row of `safe`, in its order.

    `safe.source_id` is the `sample_id` of the unsafe image, which is also the key of its caption.
    """
    sources = safe["source_id"].to_pylist()
    rejected, described = _rows_of(unsafe, sources), _rows_of(captions, sources)
    return pa.table(
        {
            "pair_id": safe["pair_id"],
            "prompt_id": rejected["prompt_id"],
            "prompt": safe["prompt"],
            "name": rejected["name"],
            "caption": described["caption"],
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


def _rows_of(table: pa.Table, sample_ids: Sequence[str]) -> pa.Table:
    """Return the rows with these sample ids, in this order."""
    rows = {sample_id: i for i, sample_id in enumerate(table["sample_id"].to_pylist())}
    indices = [rows[sample_id] for sample_id in sample_ids]
    return table.take(pa.array(indices, pa.int64()))  # an empty list alone has the type null, which take refuses
