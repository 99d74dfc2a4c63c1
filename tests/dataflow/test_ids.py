"""Ids derived from content."""

from __future__ import annotations

import string

import pytest

from vce_ray.dataflow.ids import stable_id


def test_stable_id():
    assert stable_id("deer", 1, {"b": 2, "a": [True, None]}) == stable_id("deer", 1, {"a": [True, None], "b": 2})
    ids = {stable_id(1), stable_id("1"), stable_id(1.0), stable_id([1]), stable_id(), stable_id(1, 1), stable_id("é")}
    assert len(ids) == 7
    assert all(len(value) == 16 and set(value) <= set(string.hexdigits.lower()) for value in ids)
    assert stable_id("deer", 3) == "01c79c74679c2143"
    with pytest.raises(ValueError, match="from JSON values"):
        stable_id(object())
    with pytest.raises(ValueError, match="from JSON values"):
        stable_id(float("nan"))
