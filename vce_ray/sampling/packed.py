"""Weights in the layout that the compiled step multiplies with, made anew when they have changed."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from vce_ray.sampling.compiled import CLayer, StepKernels, step_kernels
from vce_ray.sampling.device import free_memory
from vce_ray.sampling.layers import LayerWeights, linears, plain

Place = tuple[Tensor, Tensor, Tensor, Tensor]
"""cos_SD, sin_SD, slot_R and first_R: where the tokens of a step go (decoder.py)."""


class PackedStack:
    """Packed copies of a Llama's layers and its image head, where a step can be taken with such.

    Args:
        language_model: transformers' or peft's modules.
        head: the modules of the image head, one after the other.
    """

    def __init__(self, language_model: Any, head: list[Any]):
        self._model, self._head = language_model, head
        self._fingerprint: list[tuple[int, int]] | None = None
        self._kernels: StepKernels | None = None
        self._layers: list[LayerWeights] = []
        self._packed_head: list[Tensor | None] = []
        self._table: ctypes.Array[CLayer] = (CLayer * 0)()

    def update(self) -> bool:
        """Packs the weights as they are now, unless that is done; whether steps can be taken with them.

        They can on a CPU with a compiler: float32, no bias and no adapter on any matrix, and sizes of whole panels. The
        copies may take a quarter of the memory that is free.
        """
        found = list(linears(self._model))
        weight = self._model.embed_tokens.weight
        mine = weight.device.type == "cpu" and weight.dtype == torch.float32  # for what else nothing is compiled
        kernels = step_kernels() if mine else None
        if kernels is None or not self._packable(found, kernels):
            self._fingerprint, self._layers, self._packed_head = None, [], []
            return False
        # every change in place that autograd knows of (an optimizer's, a load, a merge) counts the version up
        weights = [linear.weight for linear in found + self._head_linears]
        fingerprint = [(weight.data_ptr(), weight._version) for weight in weights]
        if fingerprint != self._fingerprint:
            self._fingerprint, self._layers, self._packed_head = fingerprint, [], []  # the old ones are freed first
            self._kernels = kernels
            self._layers = [_packed(layer, kernels) for layer in self._model.layers]
            self._packed_head = [
                kernels.pack(part.weight) if isinstance(part, nn.Linear) else None for part in self._head
            ]
        return True

    def begin(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Takes the cache of each layer, [R, H, S, D], that the next steps read and write."""
        tensors = ((*layer, *cache) for layer, *cache in zip(self._layers, keys, values, strict=True))
        self._table = (CLayer * len(keys))(*(CLayer(*(tensor.data_ptr() for tensor in of)) for of in tensors))
        self._cache = keys[0]

    def step(self, embeds_RE: Tensor, place: Place) -> Tensor:
        """Reads one more token of each row; its hidden state behind the last norm, [R, E]."""
        assert self._kernels is not None, "update() comes first"
        config, last = self._model.config, self._model.norm
        sizes = config.num_attention_heads, config.intermediate_size
        epsilon = last.variance_epsilon
        return self._kernels.step(self._table, last.weight, epsilon, embeds_RE, place, self._cache, *sizes)

    def head(self, hidden_RE: Tensor) -> Tensor:
        """Logits of the next image token, [R, V]."""
        assert self._kernels is not None, "update() comes first"
        for part, packed in zip(self._head, self._packed_head, strict=True):
            hidden_RE = part(hidden_RE) if packed is None else self._kernels.multiply(hidden_RE, packed, part.bias)
        return hidden_RE

    @property
    def _head_linears(self) -> list[Any]:
        return [part for part in self._head if isinstance(part, nn.Linear)]

    def _packable(self, found: list[Any], kernels: StepKernels) -> bool:
        if self._model.config.hidden_act != "silu":
            return False
        every = found + self._head_linears
        if not plain(found) or any(len(linear.weight) % kernels.panel for linear in every):
            return False
        norms = [
            norm for layer in self._model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        if any(norm.variance_epsilon != self._model.norm.variance_epsilon for norm in norms):
            return False
        needed = sum(linear.weight.nbytes for linear in every)
        return bool(self._layers) or needed < free_memory(every[0].weight.device) / 4


def _packed(layer: Any, kernels: StepKernels) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    return LayerWeights(
        layer.input_layernorm.weight,
        kernels.pack(qkv),
        kernels.pack(attention.o_proj.weight),
        layer.post_attention_layernorm.weight,
        kernels.pack(mlp.gate_proj.weight, mlp.up_proj.weight),
        kernels.pack(mlp.down_proj.weight),
    )
