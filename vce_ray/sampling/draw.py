"""Draw image tokens with classifier-free guidance; every sample has its own seed.

Works on prompts and tokens only: no pixels, files or Ray. The shape legend is in models/base.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.models.base import ImageModel
from vce_ray.sampling.rolling import RollingBatch

CHECK_EVERY = 16
"""Steps between checks whether to stop, and between chances for waiting images to join."""


def draw(
    model: ImageModel,
    prompts: list[str],
    seeds: list[int],
    sampling: SamplingConfig,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Draw the image tokens of one image for each (prompt, seed) pair: int64 [B, T].

    Images are drawn in batches of `sampling.batch_size`, or of as many as fit into memory (see RollingBatch).

    Args:
        stop: called every CHECK_EVERY steps. Once it returns True, the current batch is dropped and only the tokens of
            earlier batches are returned.

    Raises:
        ValueError: the numbers of prompts and seeds differ.
        UserError: a prompt is empty or too long.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
    batch: RollingBatch[int] = RollingBatch(model, sampling)
    started, finished = 0, []
    while len(batch) or started < len(prompts):
        if not len(batch):
            share = slice(started, started + sampling.batch_size)
            started += batch.join(range(started, len(prompts)), prompts[share], seeds[share])
        if stop is not None and stop():
            batch.drop(range(len(prompts)))
            break
        finished += [tokens for _, tokens in batch.advance(model.num_image_tokens if stop is None else CHECK_EVERY)]
    return torch.stack(finished) if finished else torch.empty((0, model.num_image_tokens), dtype=torch.int64)
