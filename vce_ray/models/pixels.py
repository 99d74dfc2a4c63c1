"""Decode image tokens to pixels in batches of a fixed size.

How a convolution rounds its sums depends on the batch size. With a fixed one, an image does not depend on the images
decoded beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DECODE_BATCH = 4
"""Images decoded at once. Larger batches are no faster on CPUs, and on GPUs decoding takes little of the time."""


def decode_in_batches(tokens_BT: Tensor, decode: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Decode image tokens to images, uint8 [B, H, W, 3].

    Args:
        decode: takes int64 [DECODE_BATCH, T], returns values in -1..1, [DECODE_BATCH, 3, H, W].
    """
    parts = []
    for tokens in tokens_BT.split(DECODE_BATCH):
        missing = DECODE_BATCH - len(tokens)
        pixels = decode(torch.cat([tokens, tokens[-1:].expand(missing, -1)]))[: len(tokens)].float()
        parts.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).numpy()
