"""A small pair set for the tests of training."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from training_runs import PAIRS

from vce_ray.config import EMBEDDED, PROMPT_MODES, SamplingConfig
from vce_ray.dataflow import schemas
from vce_ray.models.folder import base_stamp
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.storage.store import Store
from vce_ray.training.reference import Reference


@pytest.fixture(scope="session")
def pair_set(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small pair set, drawn without Ray: deer against other animals, with cats and houses to keep."""
    torch.set_num_threads(2)
    store = Store(tmp_path_factory.mktemp("training"))
    model = load_model()
    prompts = [f"a deer in the style of {s} on a {b} background" for s in ("noto", "fluent") for b in ("red", "white")]
    prompts = prompts * (PAIRS // len(prompts))
    refined = [prompt.replace("a deer", "a fox") for prompt in prompts]
    keep = [prompt.replace("a deer", name) for prompt, name in zip(prompts, ["a cat", "a house"] * 4, strict=True)]
    seeds = list(range(PAIRS))
    drawn = draw(model, prompts + refined + keep, seeds * 3, SamplingConfig()).tolist()
    rejected, chosen, kept = drawn[:PAIRS], drawn[PAIRS : 2 * PAIRS], drawn[2 * PAIRS :]
    tokens = schemas.TOKENS
    ids = [f"pair{i}" for i in range(PAIRS)]
    pairs = pa.table(
        {
            "pair_id": ids,
            "prompt": prompts,
            "refined_caption": refined,
            "chosen": pa.array(chosen, tokens),
            "rejected": pa.array(rejected, tokens),
        }
    )
    stage = store.stage("pairs")
    stage.publish([stage.write_part(pairs)], key="pair_id")
    stage = store.stage("keep")
    table = pa.table({"sample_id": ids, "prompt": keep, "tokens": pa.array(kept, tokens)})
    stage.publish([stage.write_part(table)], key="sample_id")
    rows, _ = Reference(EMBEDDED, {"a": PROMPT_MODES})([row | {"run": "a"} for row in pairs.to_pylist()])
    stage = store.stage("reference")
    part = stage.write_part(pa.Table.from_pylist(rows, schemas.reference(PROMPT_MODES)))
    stage.publish([part], key="pair_id", **base_stamp(EMBEDDED))
    return store
