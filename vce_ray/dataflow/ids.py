"""Identifiers that follow from what they name, so that the same row gets the same id on every machine."""

from __future__ import annotations

import hashlib
import json


def stable_id(*parts: object) -> str:
    """16 hexadecimal characters that depend on nothing but `parts`.

    Parts are JSON values (strings, numbers, booleans, None, lists, dicts with string keys). They are hashed
    as canonical JSON, so the order of a dict's keys does not matter while the type of a value does: 1, 1.0
    and '1' are three different parts. Raises ValueError for a value that JSON cannot hold.
    """
    try:
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an id is made of JSON values only: {error}") from error
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
