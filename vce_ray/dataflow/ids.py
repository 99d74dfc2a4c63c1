"""Ids derived from content, so that the same row gets the same id on every machine."""

from __future__ import annotations

import hashlib
import json


def stable_id(*parts: object) -> str:
    """Return an id of 16 hexadecimal characters that depends only on `parts`.

    Parts are JSON values (strings, numbers, booleans, None, lists, dicts with string keys), hashed as canonical JSON.
    The order of a dict's keys does not matter, but the type of a value does: 1, 1.0 and '1' give three different ids.

    Raises:
        ValueError: a part is not a JSON value.
    """
    try:
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ids can only be made from JSON values: {error}") from error
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
