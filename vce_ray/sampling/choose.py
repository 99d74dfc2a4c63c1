"""From logits to a token: guidance, temperature, top-k, top-p, Gumbel noise."""

from __future__ import annotations

from torch import Tensor

from vce_ray.config import SamplingConfig


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """Return guided logits: unconditional + scale * (conditional - unconditional), as defined by Janus and LlamaGen."""
    return unconditional_BV + scale * (conditional_BV - unconditional_BV)


def choose(logits_BV: Tensor, noise_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Sample one token per row with Gumbel noise: int64 [B]. Temperature 0 takes the most likely token."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, float("-inf"))
    if sampling.top_p is not None:
        logits_BV = logits_BV.masked_fill(logits_BV < _nucleus_threshold(logits_BV, sampling.top_p), float("-inf"))
    return (logits_BV + noise_BV).argmax(-1)


def _nucleus_threshold(logits_BV: Tensor, top_p: float) -> Tensor:
    """Return the smallest logit in the smallest set of tokens whose total probability is at least `top_p`: [B, 1]."""
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    before_BV = sorted_BV.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all more likely tokens
    before_BV[:, 0] = 0
    return sorted_BV.masked_fill(before_BV >= top_p, float("inf")).amin(-1, keepdim=True)
