"""The state of a batch in progress, shared by the plain loop and by captured steps.

Shape legend: B images, T image tokens, R rows: B, or 2B under guidance; E width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BatchState:
    """The images in progress, without their cache, which belongs to the decoder."""

    hidden_RE: Tensor
    """Hidden state of each row's last token."""
    seeds_B: Tensor
    steps_B: Tensor
    """int64: number of tokens drawn so far."""
    tokens_BT: Tensor
    logit_sums_B: Tensor
    """float32: sum of all logits so far. It is finite exactly if they all were, short of sums beyond 1e38."""

    @staticmethod
    def start(hidden_RE: Tensor, seeds_B: Tensor, tokens: int) -> BatchState:
        """Return the state of images of this many tokens before their first one."""
        return BatchState(
            hidden_RE,
            seeds_B,
            torch.zeros_like(seeds_B),
            seeds_B.new_zeros(len(seeds_B), tokens),
            torch.zeros_like(seeds_B, dtype=torch.float32),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors in a fixed order."""
        return self.hidden_RE, self.seeds_B, self.steps_B, self.tokens_BT, self.logit_sums_B
