"""How a Llama's layer is applied while drawing: by its modules, or on a CPU with packed copies of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vce_ray.env import CAPTURE
from vce_ray.sampling.compiled import compiled_for, step_kernels
from vce_ray.sampling.device import free_memory
from vce_ray.sampling.packed import can_multiply_packed, combine_packed, multiply_packed, pack


class Layer(Protocol):
    """What a decoder needs of a layer."""

    def project(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values of all heads, one after the other, not yet rotated: [..., heads * D]."""
        ...

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: output projection and feed-forward, with their residuals."""
        ...


class ModuleLayer:
    """Calls the modules, adapters included."""

    def __init__(self, layer: Any):
        self._layer = layer

    def project(self, hidden: Tensor) -> Tensor:
        attention, normed = self._layer.self_attn, norm(self._layer.input_layernorm, hidden)
        return torch.cat([attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)], dim=-1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self._layer.self_attn.o_proj(attended)
        return hidden + self._layer.mlp(norm(self._layer.post_attention_layernorm, hidden))


class PackedLayer:
    """Multiplies with packed copies of the weights, and takes activation, product and residual sum along."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self._before, self._between = layer.input_layernorm, layer.post_attention_layernorm
        joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        self._qkv, self._out = pack(joined), pack(attention.o_proj.weight)
        self._down = pack(mlp.down_proj.weight)
        self._kernels = step_kernels()
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        self._gate_up = [pack(torch.cat([gate, up]))] if self._kernels else [pack(gate), pack(up)]

    def project(self, hidden: Tensor) -> Tensor:
        return multiply_packed(norm(self._before, hidden), self._qkv)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = combine_packed(attended, self._out, hidden, "add")
        normed = norm(self._between, hidden)
        if self._kernels:
            gated = self._kernels.gate(multiply_packed(normed, self._gate_up[0]))
        else:
            gate, up = self._gate_up
            gated = combine_packed(normed, up, multiply_packed(normed, gate, "swish"), "mul")
        return combine_packed(gated, self._down, hidden, "add")


class PackedHead:
    """An image head, packed: linear modules, and what lies between them."""

    def __init__(self, parts: list[Any]):
        self._parts = [(part, pack(part.weight) if isinstance(part, nn.Linear) else None) for part in parts]

    def __call__(self, hidden: Tensor) -> Tensor:
        for part, weight in self._parts:
            hidden = part(hidden) if weight is None else multiply_packed(hidden, weight, bias=part.bias)
        return hidden


class Stack:
    """Layers and image head as they are to be applied now; packed anew when the weights have changed."""

    def __init__(self, language_model: Any, head: list[Any]):
        self._model, self._head_parts = language_model, head
        self._fingerprint: list[tuple[int, int]] | None = None
        self._packed: list[Layer] = []
        self.head: Callable[[Tensor], Tensor] = nn.Sequential(*head)
        """From hidden states [..., E] to logits of the next image token [..., V]; as of the last call of `layers`."""

    def layers(self) -> list[Layer]:
        """One for each layer of the model."""
        found = list(linears(self._model))
        if not self._can_pack(found):
            self._fingerprint, self._packed, self.head = None, [], nn.Sequential(*self._head_parts)
            return [ModuleLayer(layer) for layer in self._model.layers]
        # every change in place that autograd knows of (an optimizer's, a load, a merge) counts the version up
        weights = [linear.weight for linear in found + self._head_linears]
        fingerprint = [(weight.data_ptr(), weight._version) for weight in weights]
        if fingerprint != self._fingerprint:
            self._fingerprint, self._packed = fingerprint, []  # the old ones are freed first
            self.head = PackedHead(self._head_parts)
            self._packed = [PackedLayer(layer) for layer in self._model.layers]
        return self._packed

    @property
    def _head_linears(self) -> list[Any]:
        return [part for part in self._head_parts if isinstance(part, nn.Linear)]

    def _can_pack(self, found: list[Any]) -> bool:
        weight = self._model.embed_tokens.weight
        if not can_multiply_packed() or weight.device.type != "cpu":
            return False
        if weight.dtype != torch.float32 or self._model.config.hidden_act != "silu" or not plain(found):
            return False
        needed = sum(linear.weight.nbytes for linear in found + self._head_linears)
        return bool(self._packed) or needed < free_memory(weight.device) / 4


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
