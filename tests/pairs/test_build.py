"""The prompts of a run, and the tables that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vce_ray.concepts.load import load_concept
from vce_ray.config import SamplingConfig
from vce_ray.dataflow import schemas
from vce_ray.pairs.build import join_pairs, keep_images, run_prompts
from vce_ray.pairs.prompts import erase_prompts, keep_prompts
from vce_ray.run_config import RunConfig

SETTINGS: dict[str, Any] = {
    "concept": "deer",
    "pairs": {"num_pairs": 3, "num_keep": 2},
    "sampling": SamplingConfig(),
    "seed": 5,
}


def table(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    """Build a table. Columns missing from a row are null."""
    return pa.Table.from_pylist(rows, schema)


UNSAFE = table(
    schemas.UNSAFE,
    [
        {"sample_id": f"u{i}", "prompt_id": f"p{i}", "prompt": f"prompt {i}", "kind": kind, "name": name, "seed": i}
        | {"tokens": [i, i], "image": f"unsafe {i}".encode()}
        for i, (kind, name) in enumerate([("erase", "deer"), ("keep", "fox"), ("erase", "stag"), ("keep", "")])
    ],
)
CAPTIONS = table(
    schemas.CAPTIONS,
    [
        {"sample_id": f"u{i}", "caption": f"caption {i}", "refined_caption": f"refined {i}", "tokens": [i, i]}
        for i in (0, 2)
    ],
)
SAFE = table(
    schemas.SAFE,
    [
        {"pair_id": f"pair {i}", "source_id": f"u{i}", "sample_id": f"s{i}", "prompt": f"prompt {i}"}
        | {"refined_caption": f"refined {i}", "check_caption": f"check {i}", "chosen": [9, i], "rejected": [i, i]}
        | {"image": f"safe {i}".encode(), "seed": 1, "attempt": 1}
        for i in (2, 0)  # in the order in which they were drawn
    ],
)


def test_a_run_draws_erase_prompts_then_keep_prompts() -> None:
    concept = load_concept("deer")
    prompts = run_prompts(RunConfig(**SETTINGS), concept)
    assert prompts == erase_prompts(concept, 3, 5) + keep_prompts(concept, 2, 5)


def test_a_prompts_file_replaces_the_erase_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a deer in snow\na stag\n")
    lines: list[str] = []
    prompts = run_prompts(RunConfig(**SETTINGS, prompts_file=str(path)), load_concept("deer"), lines.append)
    assert lines == [
        "2 of 2 different prompts in the file are used, for 3 pairs. The evaluation draws the concept's own templates"
    ]
    assert [row.prompt for row in prompts[:3]] == ["a deer in snow", "a stag", "a deer in snow"]
    assert [row.kind for row in prompts] == ["erase"] * 3 + ["keep"] * 2


def test_a_run_on_the_pairs_of_other_runs_draws_nothing() -> None:
    assert run_prompts(RunConfig(**SETTINGS, pairs_of=("a", "b")), load_concept("deer")) == []
    lines: list[str] = []
    config = RunConfig(**SETTINGS, pairs_of=("a", "b"), prompts_file="unread.txt")
    assert run_prompts(config, load_concept("deer"), lines.append) == [] and lines == []


def test_keep_images_are_those_of_keep_prompts() -> None:
    kept = keep_images(UNSAFE)
    assert kept.column_names == ["sample_id", "prompt", "name", "tokens", "image"]
    assert kept["sample_id"].to_pylist() == ["u1", "u3"]
    assert keep_images(UNSAFE.slice(0, 1)).num_rows == 0


def test_pairs_join_the_unsafe_image_its_caption_and_the_safe_image() -> None:
    pairs = join_pairs(UNSAFE, CAPTIONS, SAFE)
    assert pairs.to_pylist() == [
        {
            "pair_id": f"pair {i}",
            "prompt_id": f"p{i}",
            "prompt": f"prompt {i}",
            "name": name,
            "caption": f"caption {i}",
            "refined_caption": f"refined {i}",
            "check_caption": f"check {i}",
            "rejected_id": f"u{i}",
            "chosen_id": f"s{i}",
            "rejected": [i, i],
            "chosen": [9, i],
            "rejected_image": f"unsafe {i}".encode(),
            "chosen_image": f"safe {i}".encode(),
        }
        for i, name in ((2, "stag"), (0, "deer"))
    ]


def test_without_safe_images_the_table_is_empty_with_the_same_schema() -> None:
    empty = join_pairs(UNSAFE, CAPTIONS, SAFE.slice(0, 0))
    assert empty.num_rows == 0
    assert empty.schema == join_pairs(UNSAFE, CAPTIONS, SAFE).schema


def test_a_missing_unsafe_image_is_a_bug() -> None:
    with pytest.raises(KeyError, match="u2"):
        join_pairs(UNSAFE.slice(0, 2), CAPTIONS, SAFE)
