"""Draws image tokens with classifier-free guidance; each sample has its own seed.

Knows prompts and tokens, not pixels, files or Ray. The shape legend is in models/base.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.sampling.rolling import RollingBatch

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel

CHECK_EVERY = 16
"""Steps between two looks at whether to go on, or whether others wait."""


def draw(
    model: ImageModel,
    prompts: list[str],
    seeds: list[int],
    sampling: SamplingConfig,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Image tokens of one picture for each (prompt, seed): int64 [B, T], drawn in batches of `sampling.batch_size`, or
    of what fits into memory (RollingBatch has more). `stop` is asked every few steps whether to give up: then only the
    batches that were finished before are returned.

    Raises:
        ValueError: prompts and seeds differ in number, or a prompt is empty or too long.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    batch: RollingBatch[int] = RollingBatch(model, sampling)
    begun, drawn = 0, []
    while len(batch) or begun < len(prompts):
        if not len(batch):
            share = slice(begun, begun + sampling.batch_size)
            begun += batch.join(range(begun, len(prompts)), prompts[share], seeds[share])
        if stop is not None and stop():
            batch.drop(range(len(prompts)))
            break
        drawn += [tokens for _, tokens in batch.advance(model.num_image_tokens if stop is None else CHECK_EVERY)]
    return torch.stack(drawn) if drawn else torch.empty((0, model.num_image_tokens), dtype=torch.int64)
