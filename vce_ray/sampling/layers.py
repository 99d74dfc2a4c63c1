"""How sampling applies a Llama layer through its modules, and which fast paths its matrices allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vce_ray.env import CAPTURE
from vce_ray.sampling.fallback import given_up


class LayerWeights(NamedTuple):
    """The weights of one layer, matrices of a common input joined. The order is that of compiled.CLayer."""

    before: Tensor
    """Norm before attention."""
    qkv: Tensor
    out: Tensor
    between: Tensor
    """Norm between attention and feed-forward."""
    gate_up: Tensor
    down: Tensor


def project_qkv(layer: Any, hidden: Tensor) -> Tensor:
    """Return queries, keys and values of all heads side by side, before rotation: [..., heads * D]."""
    attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, hidden)
    return torch.cat([attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)], dim=-1)


def finish_layer(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """Apply what follows attention: output projection and feed-forward, each with its residual."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))


def layer_linears(language_model: Any) -> Iterator[Any]:
    """Yield the modules that hold the matrices of all layers."""
    for layer in language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def are_plain(modules: Iterable[nn.Module]) -> bool:
    """Return whether all modules are linear, without bias and without an adapter on them."""
    return all(type(module) is nn.Linear and module.bias is None for module in modules)


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def on_current_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is on the GPU that new kernels are launched on."""
    return tensor.is_cuda and tensor.device.index == torch.cuda.current_device()


def capturable(language_model: Any) -> bool:
    """Return whether a step can be captured as a CUDA graph.

    The weights must be on the current GPU, with every adapter merged, and the width of a head must be a power of two,
    as Triton's blocks are. None can be once one could not be built (fallback.py).
    """
    config = language_model.config
    if not on_current_gpu(language_model.embed_tokens.weight) or not CAPTURE.get() or given_up():
        return False
    if config.hidden_act != "silu" or not are_plain(layer_linears(language_model)):
        return False
    width = head_width(config)
    return width & (width - 1) == 0


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """Apply a Llama's RMSNorm as one operation; the module itself takes seven."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def attend_to_cache(query_RHD: Tensor, keys_RKSD: Tensor, values_RKSD: Tensor, unused_R11S: Tensor | None) -> Tensor:
    """Attend with one query per row to the used part of the cache: [R, H * D]. Heads that share keys are neighbours.

    Two batched products: on CPUs a third faster than torch's fused attention, which is parallel over long queries and
    not over rows.
    """
    query = query_RHD.unflatten(1, (keys_RKSD.shape[1], -1)).flatten(0, 1)  # [R K, H / K, D]
    keys, values = keys_RKSD.flatten(0, 1), values_RKSD.flatten(0, 1)
    scale = query_RHD.shape[-1] ** -0.5
    scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=scale)
    if unused_R11S is not None:
        scores.unflatten(0, (len(query_RHD), -1)).masked_fill_(unused_R11S, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(len(query_RHD), -1)


def negate_left_half(sin: Tensor) -> Tensor:
    """Negate the left half of the last dimension, as `rotate` expects of its sines."""
    left, right = sin.chunk(2, dim=-1)
    return torch.cat((-left, right), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [..., D], pairing the halves as Llama does.

    With the sign in the table, a rotation takes one multiply-add over swapped halves instead of two.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), signed_sin)
