"""Image tokens to pixels, so that no picture depends on its company.

Convolutions round their sums otherwise in batches of another size. So a VQ decoder sees batches of one size only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DECODE_BATCH = 4
"""Pictures decoded at once; larger batches are no faster on CPUs, where decoding counts."""


def decode_in_batches(tokens_BT: Tensor, decode: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Pictures, uint8 [B, H, W, 3], of image tokens.

    Args:
        decode: from int64 [DECODE_BATCH, T] to values [DECODE_BATCH, 3, H, W] from -1 to 1.
    """
    parts = []
    for tokens in tokens_BT.split(DECODE_BATCH):
        missing = DECODE_BATCH - len(tokens)
        pixels = decode(torch.cat([tokens, tokens[-1:].expand(missing, -1)]))[: len(tokens)].float()
        parts.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).numpy()
