"""Draws image tokens with classifier-free guidance; each sample has its own seed.

Knows prompts and tokens, not pixels, files or Ray. The shape legend is in models/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.config import SamplingConfig
from vce_ray.sampling.choose import choose, guide
from vce_ray.sampling.device import free_memory
from vce_ray.sampling.layers import capturable
from vce_ray.sampling.noise import gumbel_noise
from vce_ray.sampling.plan import fitting_batch, padded_batch, whole_batch

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel, PromptBatch

CHECK_EVERY = 16
"""Steps between two looks at whether to go on."""
NOISE_AT_ONCE = 1 << 17
"""Numbers of sampling noise that are made at once, for several steps where batch and vocabulary are small."""


@torch.no_grad()
def draw(
    model: ImageModel,
    prompts: list[str],
    seeds: list[int],
    sampling: SamplingConfig,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Image tokens of one picture for each (prompt, seed): int64 [B, T], drawn in batches of `sampling.batch_size`, or
    of what fits into memory. `stop` is asked every few steps whether to give up: then only the batches that were
    finished before are returned.

    A row depends on its own prompt, seed and the settings alone, whatever else is drawn beside it, up to the last bits
    of floating-point sums, which differ with the shape of a batch: in bfloat16 these can change a token now and then.

    Raises:
        ValueError: prompts and seeds differ in number, or a prompt is empty or too long.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    model.decoder.prepare()
    captured, size = capturable(model.language_model), sampling.batch_size
    if (fitting := _fitting(model, sampling, model.prompt_tokens)) < size:
        size = whole_batch(fitting) if captured else max(1, fitting)
    parts = []
    for i in range(0, len(prompts), size):
        batch_prompts, batch_seeds = prompts[i : i + size], seeds[i : i + size]
        if captured:  # at a few sizes only: the last picture is drawn again until one is reached
            spare = padded_batch(len(batch_prompts), size) - len(batch_prompts)
            batch_prompts, batch_seeds = (
                batch_prompts + batch_prompts[-1:] * spare,
                batch_seeds + batch_seeds[-1:] * spare,
            )
        drawn = _draw_batch(model, batch_prompts, batch_seeds, sampling, captured, stop)
        if drawn is None:
            break
        parts.append(drawn[: len(prompts) - i])
    return torch.cat(parts) if parts else torch.empty((0, model.num_image_tokens), dtype=torch.long)


def _fitting(model: ImageModel, sampling: SamplingConfig, prompt_tokens: int) -> int:
    """How many pictures with prompts of so many tokens fit into the memory that is free but for the cache."""
    shape = replace(model.shape, prompt_tokens=prompt_tokens)
    free = free_memory(model.device) + model.decoder.cache_bytes
    return fitting_batch(shape, free, sampling.guidance_scale != 1, loaded=True)


def _draw_batch(
    model: ImageModel,
    prompts: list[str],
    seeds: list[int],
    sampling: SamplingConfig,
    captured: bool,
    stop: Callable[[], bool] | None,
) -> Tensor | None:
    guided, count = sampling.guidance_scale != 1, len(prompts)
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    batch = model.encode_prompts(distinct)
    longest = batch.mask_BP.shape[1]
    if count > 1 and longest > model.prompt_tokens and count > _fitting(model, sampling, longest):
        halves = slice(0, count // 2), slice(count // 2, count)
        parts = [_draw_batch(model, prompts[half], seeds[half], sampling, captured, stop) for half in halves]
        whole = [part for part in parts if part is not None]
        return torch.cat(whole) if len(whole) == len(parts) else None
    embeds_UPE, lengths_U, first_U, of_row_R = _rows(batch, guided)
    asked = torch.tensor([place[prompt] for prompt in prompts], device=model.device)
    of_row_R = torch.cat([rows[asked] for rows in of_row_R.chunk(2 if guided else 1)])
    hidden = model.decoder.begin(embeds_UPE, lengths_U, first_U, of_row_R, model.num_image_tokens - 1)
    seeds_B = torch.tensor(seeds, dtype=torch.int64, device=model.device)
    if captured:
        step = model.decoder.captured(model, count, sampling)
        if step.prepare(hidden, seeds_B):
            return step.draw(hidden, seeds_B, stop)
    return _draw_plainly(model, hidden, seeds_B, sampling, stop)


def _draw_plainly(
    model: ImageModel, hidden: Tensor, seeds_B: Tensor, sampling: SamplingConfig, stop: Callable[[], bool] | None
) -> Tensor | None:
    """Image tokens [B, T] after the decoder has read the prompts, step by step; None where `stop` said so."""
    guided = sampling.guidance_scale != 1
    # one tensor for all steps: what is kept of each of them would lie between what the next ones could use again
    tokens_TB = seeds_B.new_empty(model.num_image_tokens, len(seeds_B))
    noise = _noise_of_steps(seeds_B, model.num_image_tokens, model.image_vocab_size)
    for step, noise_BV in enumerate(noise):
        if stop is not None and step % CHECK_EVERY == 0 and stop():
            return None
        logits = model.decoder.logits(hidden)
        if guided:
            logits = guide(*logits.chunk(2), sampling.guidance_scale)
        tokens_TB[step] = tokens_B = choose(logits, noise_BV, sampling)
        if step + 1 < model.num_image_tokens:
            rows = torch.cat((tokens_B, tokens_B)) if guided else tokens_B
            hidden = model.decoder.step(F.embedding(rows, model.image_embeddings_VE))
    return tokens_TB.T.contiguous().cpu()


def _noise_of_steps(seeds_B: Tensor, steps: int, vocabulary: int) -> Iterator[Tensor]:
    """Sampling noise of one step after the other, [B, V], made for several at once where they are small."""
    moments = torch.arange(steps, device=seeds_B.device)[:, None]
    for part in moments.split(max(1, NOISE_AT_ONCE // (len(seeds_B) * vocabulary))):
        yield from gumbel_noise(seeds_B, part, vocabulary)


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
