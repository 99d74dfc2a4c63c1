"""Preference for the safe image over the unsafe one, token by token.

The idea and its two named parts, token-level average and token drop, are those of VCE (arXiv 2509.16986). The paper's
equations were not available: the exact form below is our reconstruction. For a prompt x, chosen tokens y+ (the safe
image), rejected tokens y- (the unsafe image) and the kept positions K,

    margin = mean_{t in K} [log pi(y+_t) - log ref(y+_t)] - mean_{t in K} [log pi(y-_t) - log ref(y-_t)]
    loss   = -log sigmoid(beta * margin)

Vanilla DPO (Rafailov et al., arXiv 2305.18290) replaces the means by sums and keeps all positions.

Shapes: B pairs, T image tokens, V image vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.models.base import ImageModel, PromptBatch
from vce_ray.sampling.noise import uniform_noise


def token_log_probs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return the log-probability of each given token, float32 [B, T]."""
    logits_BTV = logits_BTV.float()
    picked = logits_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1)
    return picked - logits_BTV.logsumexp(-1)


def pair_log_probs(model: ImageModel, prompts: PromptBatch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probs of both sides, each float32 [B, T], from one forward pass of 2B rows."""
    both = prompts.rows(torch.arange(len(prompts), device=chosen.device).repeat(2))
    tokens = torch.cat([chosen, rejected])
    log_probs = token_log_probs(model.image_logits(both, tokens), tokens)
    chosen_BT, rejected_BT = log_probs.chunk(2)
    return chosen_BT, rejected_BT


def token_drop_mask(seeds_B: Tensor, step: int, num_tokens: int, drop: float) -> Tensor:
    """Draw the kept positions K of each pair: bool [B, T], each position dropped with probability `drop`.

    The mask depends on the pair's seed and the step alone, so it is the same on one worker and on many. If every
    position of a pair is dropped, all of them are kept.
    """
    keep = uniform_noise(seeds_B, step, num_tokens) >= drop
    return keep | ~keep.any(-1, keepdim=True)


@dataclass(frozen=True)
class Preference:
    """Loss and metrics of a batch of pairs; each is float32 [B]."""

    loss: Tensor
    margin: Tensor
    """Chosen minus rejected log-ratio: per token if averaged, per image if summed."""
    chosen_ratio: Tensor
    rejected_ratio: Tensor

    def metrics(self) -> dict[str, float]:
        """Batch means, as logged at each step."""
        return {
            "preference": self.loss.mean().item(),
            "margin": self.margin.mean().item(),
            "accuracy": (self.margin > 0).float().mean().item(),
            "chosen_ratio": self.chosen_ratio.mean().item(),
            "rejected_ratio": self.rejected_ratio.mean().item(),
        }


def preference_loss(
    chosen_BT: Tensor,
    rejected_BT: Tensor,
    chosen_ref_BT: Tensor,
    rejected_ref_BT: Tensor,
    mask_BT: Tensor,
    beta: float,
    average: bool = True,
) -> Preference:
    """Compute the loss of each pair from log-probs of policy and reference, all [B, T].

    Args:
        mask_BT: kept positions, the same for both sides of a pair.
        beta: scale of the preference.
        average: mean over the kept positions (VSafe-DPO) or their sum (vanilla DPO).
    """
    weight = mask_BT.float()
    if average:
        weight = weight / weight.sum(-1, keepdim=True)
    chosen_ratio = ((chosen_BT - chosen_ref_BT) * weight).sum(-1)
    rejected_ratio = ((rejected_BT - rejected_ref_BT) * weight).sum(-1)
    margin = chosen_ratio - rejected_ratio
    return Preference(-F.logsigmoid(beta * margin), margin, chosen_ratio, rejected_ratio)
