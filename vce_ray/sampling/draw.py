"""Draws image tokens with classifier-free guidance; each sample has its own seed.

Knows prompts and tokens, not pixels, files or Ray. The shape legend is in models/base.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.sampling.device import free_memory
from vce_ray.sampling.noise import gumbel_noise
from vce_ray.sampling.plan import fitting_batch

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel, PromptBatch


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """Guided logits: unconditional + scale * (conditional - unconditional), as Janus and LlamaGen define it."""
    return unconditional_BV + scale * (conditional_BV - unconditional_BV)


def choose(logits_BV: Tensor, seeds_B: Tensor, step: int, sampling: SamplingConfig) -> Tensor:
    """Samples one token for each row: int64 [B]. Temperature 0 takes the most likely token."""
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, float("-inf"))
    if sampling.top_p is not None:
        logits_BV = logits_BV.masked_fill(logits_BV < _nucleus_floor(logits_BV, sampling.top_p), float("-inf"))
    return (logits_BV + gumbel_noise(seeds_B, step, logits_BV.shape[-1])).argmax(-1)


def _nucleus_floor(logits_BV: Tensor, top_p: float) -> Tensor:
    """The least logit of the fewest tokens that together have probability `top_p`: [B, 1]."""
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    before_BV = sorted_BV.softmax(-1).cumsum(-1).roll(1, -1)
    before_BV[:, 0] = 0
    return sorted_BV.masked_fill(before_BV >= top_p, float("inf")).amin(-1, keepdim=True)


@torch.no_grad()
def draw(model: ImageModel, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> Tensor:
    """Image tokens of one picture for each (prompt, seed): int64 [B, T], drawn in batches of `sampling.batch_size`, or
    of what fits into memory.

    A row depends on its own prompt, seed and the settings alone, whatever else is drawn beside it (up to the
    last bits of floating-point sums, which differ with the shape of a batch).

    Raises:
        ValueError: prompts and seeds differ in number, or a prompt is empty or too long.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    free = free_memory(model.device) + model.decoder.cache_bytes
    fitting = fitting_batch(model.shape, free, sampling.guidance_scale != 1, loaded=True)
    size = max(1, min(sampling.batch_size, fitting))
    parts = [
        _draw_batch(model, prompts[i : i + size], seeds[i : i + size], sampling) for i in range(0, len(prompts), size)
    ]
    return torch.cat(parts) if parts else torch.empty((0, model.num_image_tokens), dtype=torch.long)


def _draw_batch(model: ImageModel, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> Tensor:
    guided = sampling.guidance_scale != 1
    distinct = list(dict.fromkeys(prompts))
    embeds_UPE, lengths_U, first_U, of_row_R = _rows(model.encode_prompts(distinct), guided)
    asked = torch.tensor([distinct.index(prompt) for prompt in prompts], device=model.device)
    of_row_R = torch.cat([rows[asked] for rows in of_row_R.chunk(2 if guided else 1)])
    hidden = model.decoder.begin(embeds_UPE, lengths_U, first_U, of_row_R, model.num_image_tokens - 1)
    seeds_B = torch.tensor(seeds, dtype=torch.int64, device=model.device)
    tokens = []
    for step in range(model.num_image_tokens):
        logits = model.image_head(hidden)
        if guided:
            logits = guide(*logits.chunk(2), sampling.guidance_scale)
        chosen = choose(logits, seeds_B, step, sampling)
        tokens.append(chosen)
        if step + 1 < model.num_image_tokens:
            embeds = F.embedding(chosen, model.image_embeddings_VE)
            hidden = model.decoder.step(embeds.repeat(2, 1) if guided else embeds)
    return torch.stack(tokens, dim=1).cpu()


def _rows(batch: PromptBatch, guided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the decoder reads first: embeddings (padded on the right), lengths and first positions of what is distinct,
    and which of them each row is: all conditional rows, then, where guided, all unconditional ones.

    An unconditional row depends on its length alone, so prompts of one length share theirs.
    """
    lengths_B, width = batch.mask_BP.sum(1), batch.mask_BP.shape[1]
    place_BP = (torch.arange(width, device=lengths_B.device) + (width - lengths_B)[:, None]) % width
    embeds_BPE, unconditional_BPE = (
        embeds.gather(1, place_BP[..., None].expand_as(embeds))
        for embeds in (batch.embeds_BPE, batch.unconditional_BPE)
    )
    own = torch.arange(len(batch), device=lengths_B.device)
    if not guided:
        return embeds_BPE, lengths_B, batch.first_B, own
    lengths_L, of_length_B = lengths_B.unique(return_inverse=True)
    one_L = torch.stack([(lengths_B == length).nonzero()[0, 0] for length in lengths_L])
    return (
        torch.cat([embeds_BPE, unconditional_BPE[one_L]]),
        torch.cat([lengths_B, lengths_L]),
        torch.cat([batch.first_B, batch.first_B[one_L]]),
        torch.cat([own, len(batch) + of_length_B]),
    )
