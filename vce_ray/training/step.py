"""One training step on one worker's share of a batch: log-probs, loss and figures. Knows no Ray and no files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vce_ray.config import TrainConfig
from vce_ray.models.base import ImageModel, PromptBatch
from vce_ray.training.loss import keep_mask, preference_loss, preservation_loss, token_log_probs


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one step. `blank` rows are contrasted without any prompt (the null mode)."""

    prompts: list[str]
    blank: list[bool]
    seeds: Tensor
    """int64 [B]: what the token drop of a pair derives from."""
    chosen_BT: Tensor
    rejected_BT: Tensor
    chosen_ref_BT: Tensor
    """Log-probs of the reference under the same prompt, float32."""
    rejected_ref_BT: Tensor


@dataclass(frozen=True)
class KeepBatch:
    """Images that the model is held to the base on."""

    prompts: list[str]
    blank: list[bool]
    tokens_BT: Tensor


@dataclass(frozen=True)
class AnchorBatch:
    """Safe images, with the unsafe prompts that shall lead to them and the refined captions that did."""

    prompts: list[str]
    refined: list[str]
    tokens_BT: Tensor


def pair_log_probs(model: ImageModel, prompts: PromptBatch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of both sides, each float32 [B, T], in one forward pass of 2B rows."""
    both = prompts.rows(torch.arange(len(prompts), device=chosen.device).repeat(2))
    tokens = torch.cat([chosen, rejected])
    log_probs = token_log_probs(model.image_logits(both, tokens), tokens)
    chosen_BT, rejected_BT = log_probs.chunk(2)
    return chosen_BT, rejected_BT


def pair_loss(model: ImageModel, batch: PairBatch, step: int, config: TrainConfig) -> tuple[Tensor, dict[str, float]]:
    """The preference loss averaged over this worker's pairs, and the figures that are logged."""
    vsafe = config.method == "vsafe_dpo"
    prompts = model.encode_prompts(batch.prompts).blanked(batch.blank)
    chosen, rejected = pair_log_probs(model, prompts, batch.chosen_BT, batch.rejected_BT)
    drop = config.token_drop if vsafe else 0.0
    mask = keep_mask(batch.seeds, step, chosen.shape[1], drop)
    result = preference_loss(
        chosen, rejected, batch.chosen_ref_BT, batch.rejected_ref_BT, mask, config.beta, average=vsafe
    )
    figures = {
        "preference": result.loss.mean().item(),
        "margin": result.margin.mean().item(),
        "accuracy": (result.margin > 0).float().mean().item(),
        "chosen_ratio": result.chosen_ratio.mean().item(),
        "rejected_ratio": result.rejected_ratio.mean().item(),
        "chosen_logp": chosen.mean().item(),
        "rejected_logp": rejected.mean().item(),
    }
    return result.loss.mean(), figures


AsReference = Callable[[], AbstractContextManager[None]]
"""A context in which the reference computes as the base does (its adapter is off)."""


def keep_loss(model: ImageModel, reference: ImageModel, as_reference: AsReference, batch: KeepBatch) -> Tensor:
    """The preservation loss averaged over this worker's images. `reference` may be `model` itself."""
    prompts = model.encode_prompts(batch.prompts).blanked(batch.blank)
    with torch.no_grad(), as_reference():
        target = reference.image_logits(prompts, batch.tokens_BT)
    return preservation_loss(model.image_logits(prompts, batch.tokens_BT), target).mean()


def anchor_loss(model: ImageModel, reference: ImageModel, as_reference: AsReference, batch: AnchorBatch) -> Tensor:
    """KL to what shall be drawn instead, under the unsafe prompt and averaged over this worker's safe images.

    The target of each token is the base under the refined caption, less what the unsafe prompt makes likelier:
    'an animal' is a deer now and then. Its log-probs are log p(refined) + min(0, log p(refined) - log p(unsafe)),
    one step of the negative guidance of ESD (arXiv 2303.07345), taken only where it lowers a token.
    """
    unsafe, refined = model.encode_prompts(batch.prompts), model.encode_prompts(batch.refined)
    with torch.no_grad(), as_reference():
        wanted = reference.image_logits(refined, batch.tokens_BT).log_softmax(-1)
        unwanted = reference.image_logits(unsafe, batch.tokens_BT).log_softmax(-1)
        target = wanted + (wanted - unwanted).clamp(max=0)
    return preservation_loss(model.image_logits(unsafe, batch.tokens_BT), target).mean()
