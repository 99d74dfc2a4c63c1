"""Log-probs of the frozen base on both sides of each pair, per token, computed once so that training needs no second
pass.

They belong to one revision of the base, which the stage's manifest names (base_stamp in models/folder.py); training
refuses any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.models.base import ImageModel
from vce_ray.models.load import base_model
from vce_ray.training.terms.preference import pair_log_probs


@torch.no_grad()
def reference_log_probs(
    model: ImageModel, prompts: list[str], blank: bool, chosen_BT: Tensor, rejected_BT: Tensor, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of chosen and rejected tokens under the base: float32 [B, T] each.

    Args:
        blank: drop the prompts (the null mode).
    """
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        encoded = model.encode_prompts(prompts[rows]).blanked([blank] * len(prompts[rows]))
        parts.append(pair_log_probs(model, encoded, chosen_BT[rows], rejected_BT[rows]))
    chosen, rejected = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(rejected)


class Reference:
    """Step: pairs -> their log-probs under the base, for every prompt mode that the run's training may use.

    Args:
        modes: prompt modes by run name.
    """

    def __init__(self, base: str, modes: Mapping[str, tuple[str, ...]]):
        self.model, self.modes = base_model(base), modes

    def __call__(self, rows: list[Row]) -> Outcome:
        out: list[Row] = [{"run": row["run"], "pair_id": row["pair_id"]} for row in rows]
        for mode in dict.fromkeys(mode for row in rows for mode in self.modes[row["run"]]):
            places = [place for place, row in enumerate(rows) if mode in self.modes[row["run"]]]
            selected = [rows[place] for place in places]
            prompts = [row["refined_caption" if mode == "stripped" else "prompt"] for row in selected]
            chosen, rejected = (torch.tensor([row[side] for row in selected]) for side in ("chosen", "rejected"))
            sides = reference_log_probs(self.model, prompts, mode == "null", chosen, rejected)
            for side, log_probs in zip(("chosen", "rejected"), sides, strict=True):
                for place, values in zip(places, log_probs.tolist(), strict=True):
                    out[place][f"{side}_{mode}"] = values
        return out, []
