"""Draw image tokens with classifier-free guidance; every sample has its own seed.

Works on prompts and tokens only; independent of pixels, files and Ray. The shape legend is in models/base.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.models.base import ImageModel
from vce_ray.sampling.rolling import RollingBatch


def draw(model: ImageModel, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> Tensor:
    """Draw the image tokens of one image for each (prompt, seed) pair: int64 [B, T].

    Images are drawn in batches of `sampling.batch_size`, or of as many as fit into memory (see RollingBatch).

    Raises:
        ValueError: the numbers of prompts and seeds differ.
        UserError: a prompt is empty or too long, or an image had NaN or infinite logits.
        RuntimeError: the model is drawing for another caller, such as another thread.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
    batch: RollingBatch[int] = RollingBatch(model, sampling)
    started, finished = 0, []
    try:
        while started < len(prompts):
            share = slice(started, started + sampling.batch_size)
            started += batch.join(range(started, len(prompts)), prompts[share], seeds[share])
            finished += [tokens for _, tokens in batch.advance(model.num_image_tokens)]
    finally:  # after an interrupt, its traceback may keep the batch alive, and an unfinished batch blocks the model
        batch.drop(range(len(prompts)))
    return torch.stack(finished) if finished else torch.empty((0, model.num_image_tokens), dtype=torch.int64)
