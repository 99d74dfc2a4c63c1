"""The columns of the stages that actors make. The first column is the key of a stage."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

_text, _int, _bytes = pa.string(), pa.int64(), pa.binary()
TOKENS = pa.list_(pa.uint16())

CLAIM = pa.schema([(name, _text) for name in ("run", "stage", "part", "key", "next")])
"""What travels between workers: where a row lies, and which step comes next (fanout.py)."""
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
"""With prompt and tokens of the unsafe picture: each stage holds all that the next one reads."""
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
EVALUATION = pa.schema(
    {
        "image_id": _text,
        "prompt_id": _text,
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
