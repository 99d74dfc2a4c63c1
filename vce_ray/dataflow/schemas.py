"""Columns of the stages that actors make. The first column of each is its key."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

_text, _int, _bytes = pa.string(), pa.int64(), pa.binary()
TOKENS = pa.list_(pa.uint16())
ASKED = pa.map_(_text, _text)
"""Value of each slot of a prompt's template, `name` left out: {'style': 'noto', 'background': 'red'}."""

ROW_REF = pa.schema([(name, _text) for name in ("run", "stage", "part", "key", "next")])
"""A row reference, which is what travels between workers: where a row is, and which step comes next (fanout.py)."""
REJECTS = pa.schema({"row_id": _text, "stage": _text, "reason": _text, "detail": _text, "attempt": _int}.items())
PROMPTS = pa.schema(
    {
        "prompt_id": _text,
        "prompt": _text,
        "kind": _text,
        "name": _text,
        "template": _text,
        "held_out": pa.bool_(),
        "seed": _int,
        "asked": ASKED,
    }.items()
)
UNSAFE = pa.schema(
    {
        "sample_id": _text,
        "prompt_id": _text,
        "prompt": _text,
        "kind": _text,
        "name": _text,
        "seed": _int,
        "tokens": TOKENS,
        "image": _bytes,
    }.items()
)
CAPTIONS = pa.schema(
    {
        "sample_id": _text,
        "caption": _text,
        "refined_caption": _text,
        "removed_terms": pa.list_(_text),
        "prompt": _text,
        "tokens": TOKENS,
    }.items()
)
"""Includes prompt and tokens of the unsafe image: each stage holds everything that the next one reads."""
SAFE = pa.schema(
    {
        "pair_id": _text,
        "source_id": _text,
        "sample_id": _text,
        "prompt": _text,
        "refined_caption": _text,
        "seed": _int,
        "chosen": TOKENS,
        "rejected": TOKENS,
        "image": _bytes,
        "check_caption": _text,
        "attempt": _int,
    }.items()
)
BEFORE_AFTER = ("before", "after")
"""Values of the column `arm` of an evaluation: drawn by the base, and drawn with the adapter of the run."""
EVALUATION = pa.schema(
    {
        "image_id": _text,
        "prompt_id": _text,
        "arm": _text,
        "group": _text,
        "prompt": _text,
        "template_held_out": pa.bool_(),
        "name": _text,
        "asked": ASKED,
        "seed": _int,
        "image": _bytes,
    }.items()
)
"""Columns that all evaluation tables have. `group` is erase or keep; `name` is the object or style that the prompt asks
for, '' for a whole keep prompt; `asked` is what it asks for besides, null in runs whose prompts do not record it."""


def evaluation(detectors: Iterable[pa.Schema]) -> pa.Schema:
    """Return the schema of an evaluation table: the common columns, with those of detectors before the image.

    Raises:
        ValueError: two columns have the same name.
    """
    columns = [*EVALUATION.remove(EVALUATION.get_field_index("image")), *(f for schema in detectors for f in schema)]
    schema = pa.schema([*columns, EVALUATION.field("image")])
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise ValueError(f"two detectors add a column {twice[0]!r}, or it is a common one: rename one of them")
    return schema


def reference(modes: Iterable[str]) -> pa.Schema:
    """Return the schema of log-probs of the base on both sides of a pair, per token, under each prompt mode."""
    columns = [(f"{side}_{mode}", pa.list_(pa.float32())) for mode in modes for side in ("chosen", "rejected")]
    return pa.schema([("pair_id", _text), *columns])
