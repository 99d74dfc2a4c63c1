"""The columns of the stages that actors make. The first column is the key of a stage."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

_text, _int, _bytes = pa.string(), pa.int64(), pa.binary()
TOKENS = pa.list_(pa.uint16())

REJECTS = pa.schema({"row_id": _text, "stage": _text, "reason": _text, "detail": _text, "attempt": _int}.items())
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
    {"sample_id": _text, "caption": _text, "refined_caption": _text, "removed_terms": pa.list_(_text)}.items()
)
SAFE = pa.schema(
    {
        "sample_id": _text,
        "source_id": _text,
        "prompt": _text,
        "seed": _int,
        "tokens": TOKENS,
        "image": _bytes,
        "check_caption": _text,
        "attempt": _int,
    }.items()
)
EVALUATION = pa.schema(
    {
        "image_id": _text,
        "arm": _text,
        "group": _text,
        "prompt": _text,
        "template_held_out": pa.bool_(),
        "name": _text,
        "seed": _int,
        "label": _text,
        "seen": pa.bool_(),
        "something": pa.bool_(),
        "score": pa.float64(),
        "image": _bytes,
    }.items()
)


def reference(modes: Iterable[str]) -> pa.Schema:
    """Log-probs of the base for both sides of a pair, per token, under each prompt mode."""
    columns = [(f"{side}_{mode}", pa.list_(pa.float32())) for mode in modes for side in ("chosen", "rejected")]
    return pa.schema([("pair_id", _text), *columns])
