"""Matrix products with weights that lie in oneDNN's own layout: twice as fast on CPUs where few rows are multiplied.

torch reaches it through operators that its compiler (inductor) emits for frozen weights. They are not part of its
documented interface, so whoever uses them asks first whether they are there.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

ROWS = 32
"""Rows of a step that packing is tuned for; it serves any number."""
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def can_multiply_packed() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and _LINEAR is not None and _PACK is not None


def pack(weight: Tensor) -> Tensor:
    """A copy of a float32 matrix [out, in] in oneDNN's layout: only the functions here can read it."""
    return _PACK(weight.detach().contiguous(), ROWS)


def multiply_packed(
    x: Tensor, weight: Tensor, activation: Literal["none", "swish"] = "none", bias: Tensor | None = None
) -> Tensor:
    """Products [..., out] of x [..., in] with a packed matrix, a bias added and an activation over them."""
    return _LINEAR(x, weight, bias, activation, [], "")


def combine_packed(x: Tensor, weight: Tensor, other: Tensor, how: Literal["add", "mul"]) -> Tensor:
    """Products of x with a packed matrix, added to or multiplied with `other` [..., out]."""
    return _LINEAR.binary(x, other, weight, None, how)
