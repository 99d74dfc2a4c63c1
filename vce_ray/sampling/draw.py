"""Draws image tokens with classifier-free guidance; each sample has its own seed.

Knows prompts and tokens, not pixels, files or Ray. The shape legend is in models/base.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.sampling.noise import gumbel_noise

if TYPE_CHECKING:
    from vce_ray.models.janus import Janus


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """Guided logits: unconditional + scale * (conditional - unconditional), as Janus and LlamaGen define it."""
    return unconditional_BV + scale * (conditional_BV - unconditional_BV)


def choose(logits_BV: Tensor, seeds_B: Tensor, step: int, temperature: float, top_k: int | None) -> Tensor:
    """Samples one token for each row: int64 [B]. Temperature 0 takes the most likely token."""
    logits_BV = logits_BV.float()
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        floor = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor, float("-inf"))
    return (logits_BV + gumbel_noise(seeds_B, step, logits_BV.shape[-1])).argmax(-1)


@torch.no_grad()
def draw(model: Janus, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> Tensor:
    """Image tokens of one picture for each (prompt, seed): int64 [B, T], drawn in batches of `sampling.batch_size`.

    A row depends on its own prompt, seed and the settings alone, whatever else is drawn beside it (up to the
    last bits of floating-point sums, which differ with the shape of a batch).

    Raises:
        ValueError: prompts and seeds differ in number, or a prompt is empty or too long.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    size = sampling.batch_size
    parts = [
        _draw_batch(model, prompts[i : i + size], seeds[i : i + size], sampling) for i in range(0, len(prompts), size)
    ]
    return torch.cat(parts) if parts else torch.empty((0, model.num_image_tokens), dtype=torch.long)


def _draw_batch(model: Janus, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> Tensor:
    batch = model.encode_prompts(prompts)
    guided = sampling.guidance_scale != 1
    ids = torch.cat([batch.ids_BP, batch.unconditional_ids_BP]) if guided else batch.ids_BP
    lengths = batch.mask_BP.sum(1).repeat(2 if guided else 1)
    hidden = model.decoder.begin(_to_left(ids, lengths), lengths.cpu(), model.num_image_tokens - 1)
    seeds_B = torch.tensor(seeds, dtype=torch.int64, device=model.device)
    tokens = []
    for step in range(model.num_image_tokens):
        logits = model.core.generation_head(hidden)
        if guided:
            logits = guide(*logits.chunk(2), sampling.guidance_scale)
        chosen = choose(logits, seeds_B, step, sampling.temperature, sampling.top_k)
        tokens.append(chosen)
        if step + 1 < model.num_image_tokens:
            hidden = model.decoder.step(model.embed_image_tokens(chosen.repeat(2) if guided else chosen))
    return torch.stack(tokens, dim=1).cpu()


def _to_left(ids_RP: Tensor, lengths_R: Tensor) -> Tensor:
    """Left-padded rows moved to the left; what pads them on the right no longer matters."""
    width = ids_RP.shape[1]
    source = torch.arange(width, device=ids_RP.device) + (width - lengths_R)[:, None]
    return ids_RP.gather(1, source % width)
