"""How a Llama's layer is applied while drawing, by its modules, and what may be done with its matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vce_ray.env import CAPTURE
from vce_ray.sampling.compiled import compiled_for


class LayerWeights(NamedTuple):
    """One layer's matrices, those with a common input joined, and its norms; in the order of compiled.CLayer."""

    before: Tensor
    qkv: Tensor
    out: Tensor
    between: Tensor
    gate_up: Tensor
    down: Tensor


def project(layer: Any, hidden: Tensor) -> Tensor:
    """Queries, keys and values of all heads, one after the other, not yet rotated: [..., heads * D]."""
    attention, normed = layer.self_attn, norm(layer.input_layernorm, hidden)
    return torch.cat([attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)], dim=-1)


def finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """What follows attention: output projection and feed-forward, with their residuals."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(norm(layer.post_attention_layernorm, hidden))


def linears(language_model: Any) -> Iterator[Any]:
    """The modules that hold the matrices of all layers."""
    for layer in language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def plain(found: Iterable[nn.Module]) -> bool:
    """Whether all are linear modules without bias, and nothing lies on them."""
    return all(type(linear) is nn.Linear and linear.bias is None for linear in found)


def capturable(language_model: Any) -> bool:
    """Whether a step can be captured: matrices that lie plainly on the current GPU, with no adapter that is not merged,
    and heads of a width that Triton's blocks can have."""
    config, device = language_model.config, language_model.embed_tokens.weight.device
    if device.type != "cuda" or device.index != torch.cuda.current_device() or not CAPTURE.get():
        return False
    if config.hidden_act != "silu" or not plain(linears(language_model)):
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width & (width - 1) == 0


def norm(module: Any, x: Tensor) -> Tensor:
    """A Llama's RMSNorm in one operation; transformers' own takes seven. Not for training: it may keep no gradient."""
    if kernels := compiled_for(x, module.weight):
        return kernels.norm(x, module.weight, module.variance_epsilon)
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)
