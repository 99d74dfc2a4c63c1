"""What a loss term reads in one step: this worker's share of the pairs and of the preservation images.

Shapes: B rows, T image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Base of all batches: plain fields and tensors."""

    def to(self, device: torch.device) -> Self:
        """Return the same batch with its tensors, and those of batches inside it, on `device`."""
        moved = {field.name: _to(getattr(self, field.name), device) for field in fields(self)}
        return type(self)(**moved)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor | Batch) else value


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs of one step. Rows marked `blank` are contrasted without a prompt (the null mode)."""

    prompts: list[str]
    blank: list[bool]
    seeds: Tensor
    """int64 [B]: seeds of each pair's token drop."""
    chosen_BT: Tensor
    rejected_BT: Tensor
    chosen_ref_BT: Tensor
    """Log-probs of the reference under the same prompt, float32."""
    rejected_ref_BT: Tensor


@dataclass(frozen=True)
class KeepBatch(Batch):
    """Preservation images, on which the model is held to the base."""

    rows: list[int]
    """Row numbers in the preservation set."""
    prompts: list[str]
    blank: list[bool]
    tokens_BT: Tensor


@dataclass(frozen=True)
class AnchorBatch(Batch):
    """Safe images with the unsafe prompts that should lead to them and the refined captions that did."""

    rows: list[int]
    """Row numbers in the pair set."""
    prompts: list[str]
    refined: list[str]
    tokens_BT: Tensor
