"""From logits to a token: guidance, temperature, top-k, top-p, noise."""

from __future__ import annotations

from torch import Tensor

from vce_ray.config import SamplingConfig


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """Guided logits: unconditional + scale * (conditional - unconditional), as Janus and LlamaGen define it."""
    return unconditional_BV + scale * (conditional_BV - unconditional_BV)


def choose(logits_BV: Tensor, noise_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Samples one token for each row by Gumbel noise: int64 [B]. Temperature 0 takes the most likely token."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, float("-inf"))
    if sampling.top_p is not None:
        logits_BV = logits_BV.masked_fill(logits_BV < _nucleus_floor(logits_BV, sampling.top_p), float("-inf"))
    return (logits_BV + noise_BV).argmax(-1)


def _nucleus_floor(logits_BV: Tensor, top_p: float) -> Tensor:
    """The least logit of the fewest tokens that together have probability `top_p`: [B, 1]."""
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    before_BV = sorted_BV.softmax(-1).cumsum(-1).roll(1, -1)
    before_BV[:, 0] = 0
    return sorted_BV.masked_fill(before_BV >= top_p, float("inf")).amin(-1, keepdim=True)
