"""The state of a batch in progress, shared by the plain loop and by captured steps.

Shape legend: B images, T image tokens, R rows: B, or 2B under guidance; E width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors in a fixed order."""
        return self.hidden_RE, self.seeds_B, self.steps_B, self.tokens_BT
