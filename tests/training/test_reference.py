"""Reference log-probs: for the prompt modes of each run, and of one base only."""

from __future__ import annotations

import pytest

from vce_ray.config import EMBEDDED, PROMPT_MODES
from vce_ray.models.folder import base_stamp, check_stamp
from vce_ray.training.reference import Reference


def test_log_probs_are_made_for_the_prompt_modes_of_each_run() -> None:
    row = {"pair_id": "p", "prompt": "a deer", "refined_caption": "an animal", "chosen": [3] * 64, "rejected": [5] * 64}
    rows, rejects = Reference(EMBEDDED, {"a": PROMPT_MODES, "b": ("given",)})([row | {"run": run} for run in "abba"])
    assert [set(made) - {"run", "pair_id"} for made in rows[:2]] == [
        {f"{side}_{mode}" for side in ("chosen", "rejected") for mode in modes} for modes in (PROMPT_MODES, ("given",))
    ]
    assert [made["run"] for made in rows] == list("abba") and not rejects
    assert rows[1]["chosen_given"] == pytest.approx(rows[0]["chosen_given"], abs=1e-4) != rows[0]["chosen_null"]


def test_reference_log_probs_of_another_base_are_refused() -> None:
    ours = base_stamp(EMBEDDED)
    check_stamp(dict(ours), ours)
    with pytest.raises(ValueError, match="base_revision feedfacefeedface, this run has"):
        check_stamp(ours | {"base_revision": "feedfacefeedface"}, ours)
