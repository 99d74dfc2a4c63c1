"""VSafe-DPO: a preference for the safe image over the unsafe one, token by token.

The idea and its two named parts, token-level average and token drop, are those of VCE (arXiv 2509.16986). The
paper's equations were not at hand: the exact form below is our reconstruction. For a prompt x, chosen tokens y+
(the safe image), rejected tokens y- (the unsafe one) and the kept positions K,

    margin = mean_{t in K} [log pi(y+_t) - log ref(y+_t)] - mean_{t in K} [log pi(y-_t) - log ref(y-_t)]
    loss   = -log sigmoid(beta * margin)

Vanilla DPO (Rafailov et al., arXiv 2305.18290) is the same with sums for means and K = all positions.

Shapes: B pairs, T image tokens, V image vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.sampling.noise import uniform_noise


def token_log_probs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Log-probability of each token that was drawn, float32 [B, T]."""
    logits_BTV = logits_BTV.float()
    picked = logits_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1)
    return picked - logits_BTV.logsumexp(-1)


def keep_mask(seeds_B: Tensor, step: int, num_tokens: int, drop: float) -> Tensor:
    """The kept positions K of each pair: bool [B, T], each position dropped with probability `drop`.

    It depends on the pair's seed and the step alone, so it is the same on one worker and on many. A pair
    whose every position fell to the drop keeps them all.
    """
    keep = uniform_noise(seeds_B, step, num_tokens) >= drop
    return keep | ~keep.any(-1, keepdim=True)


@dataclass(frozen=True)
class Preference:
    """Loss and figures of a batch of pairs; each is float32 [B]."""

    loss: Tensor
    margin: Tensor
    """Chosen minus rejected log-ratio: per token where averaged, per image where summed."""
    chosen_ratio: Tensor
    rejected_ratio: Tensor


def preference_loss(
    chosen_BT: Tensor,
    rejected_BT: Tensor,
    chosen_ref_BT: Tensor,
    rejected_ref_BT: Tensor,
    mask_BT: Tensor,
    beta: float,
    average: bool = True,
) -> Preference:
    """The loss of each pair, from log-probs of policy and reference, all [B, T].

    Args:
        mask_BT: the kept positions; both sides of a pair use the same.
        beta: slope of the preference.
        average: mean over the kept positions (VSafe-DPO), or their sum (vanilla DPO).
    """
    weight = mask_BT.float()
    if average:
        weight = weight / weight.sum(-1, keepdim=True)
    chosen_ratio = ((chosen_BT - chosen_ref_BT) * weight).sum(-1)
    rejected_ratio = ((rejected_BT - rejected_ref_BT) * weight).sum(-1)
    margin = chosen_ratio - rejected_ratio
    return Preference(-F.logsigmoid(beta * margin), margin, chosen_ratio, rejected_ratio)


def preservation_loss(logits_BTV: Tensor, reference_BTV: Tensor) -> Tensor:
    """KL(reference || policy) of each next-token distribution, averaged over the tokens of an image: float32 [B]."""
    policy = F.log_softmax(logits_BTV.float(), dim=-1)
    reference = F.log_softmax(reference_BTV.float(), dim=-1)
    return F.kl_div(policy, reference, reduction="none", log_target=True).sum(-1).mean(-1)


def collapsed(margins: list[float], chosen: list[float], rejected: list[float]) -> bool:
    """Whether a run shows the collapse that vanilla DPO is known for: the margin grows while both sides fall.

    True where, between the first and the last fifth of the steps, the margin rose and the mean log-ratio of
    the chosen side fell below a third of the rejected side's fall: the model then unlearns the safe image
    almost as fast as the unsafe one.
    """
    fifth = max(1, len(margins) // 5)
    rise = _mean(margins[-fifth:]) - _mean(margins[:fifth])
    chosen_fall = _mean(chosen[:fifth]) - _mean(chosen[-fifth:])
    rejected_fall = _mean(rejected[:fifth]) - _mean(rejected[-fifth:])
    return rise > 0 and rejected_fall > 0 and chosen_fall > rejected_fall / 3


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, of sharded tensors too."""
    norms = [p.grad.detach().float().norm() for p in parameters if p.grad is not None]
    full = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return torch.stack(full).norm()
