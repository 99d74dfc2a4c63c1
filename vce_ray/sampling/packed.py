"""Weights in the layout of the compiled CPU step, packed again when they change."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from vce_ray.sampling.compiled import CLayer, StepKernels, step_kernels
from vce_ray.sampling.layers import LayerWeights, are_plain, layer_linears
from vce_ray.sampling.memory import free_memory

MEMORY_SHARE = 1 / 4
"""Packed copies may take at most this share of the free memory: the cache needs the rest."""
SAMPLED = 32
"""Numbers of each matrix that are compared to notice a change."""
Place = tuple[Tensor, Tensor, Tensor, Tensor]
"""Where the tokens of a step go: cos_SD, sin_SD, next_slot_R and first_R of decoder.py."""


class PackedStack:
    """Packed copies of a Llama's layers and its image head, for models that the compiled step supports.

    The copies follow every change of the weights that autograd counts, which is any in-place operation on the parameter
    itself, and every assignment to `.data`. Other changes, such as writes to `.data` or a fused optimizer's step, are
    noticed by a sample of SAMPLED numbers per matrix: they must not be confined to a few rows or columns.

    Args:
        language_model: a Llama of transformers, possibly with peft's layers.
        head: the modules of the image head, in order.
    """

    def __init__(self, language_model: Any, head: list[Any]):
        self._model, self._head = language_model, head
        self._fingerprint: list[tuple[int, int]] | None = None
        self._sample = torch.empty(0)
        """Some numbers of each packed matrix, as they were when it was packed."""
        self._kernels: StepKernels | None = None
        self._layers: list[LayerWeights] = []
        self._packed_head: list[Tensor | None] = []
        self._table: ctypes.Array[CLayer] = (CLayer * 0)()

    def update(self) -> bool:
        """Pack the weights if they have changed since the last call, and return whether the compiled step can be used.

        It needs a CPU with a compiler, float32, no bias and no unmerged adapter on any matrix, sizes that are whole
        panels, and memory for the copies (MEMORY_SHARE). Otherwise the copies are freed.
        """
        linears = list(layer_linears(self._model))
        weights = [linear.weight for linear in linears + self._head_linears]
        norms = [norm.weight for norm in (*self._norms, self._model.norm)]
        read = [self._model.embed_tokens.weight, *norms, *weights]
        supported = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in read)
        kernels = step_kernels() if supported else None  # compiles nothing for models it cannot be used with
        if kernels is None or not self._packable(linears, kernels):
            self._fingerprint, self._layers, self._packed_head = None, [], []
            return False
        # Comparing the weights themselves would cost as much as packing them. Autograd counts up a tensor's version on
        # most in-place changes: an optimizer step, a load, a merged adapter. Assigning to `.data` changes the address.
        # Writing to `.data` and fused optimizers change neither, and a freed address may be used again. Norms are not
        # copied, so only a new address matters.
        fingerprint = [(weight.data_ptr(), _version(weight)) for weight in weights]
        fingerprint += [(norm.data_ptr(), 0) for norm in norms]
        sample = _sample(weights)
        if fingerprint != self._fingerprint or not torch.equal(sample, self._sample):
            self._fingerprint, self._sample = fingerprint, sample
            self._layers, self._packed_head = [], []  # frees the old copies first
            self._kernels = kernels
            self._layers = [_pack_layer(layer, kernels) for layer in self._model.layers]
            self._packed_head = [
                kernels.pack(part.weight) if isinstance(part, nn.Linear) else None for part in self._head
            ]
        return True

    def set_cache(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Set the cache that the next steps read and write: one tensor [R, K, S, D] per layer."""
        tensors = ((*layer, *cache) for layer, *cache in zip(self._layers, keys, values, strict=True))
        self._table = (CLayer * len(keys))(*(CLayer(*(tensor.data_ptr() for tensor in row)) for row in tensors))
        self._cache = keys[0]

    def step(self, embeds_RE: Tensor, place: Place) -> Tensor:
        """Read one more token of each row and return its hidden state after the last norm, [R, E]."""
        assert self._kernels is not None, "update() must be called first"
        config, last = self._model.config, self._model.norm
        sizes = config.num_attention_heads, config.intermediate_size
        epsilon = last.variance_epsilon
        return self._kernels.step(self._table, last.weight, epsilon, embeds_RE, place, self._cache, *sizes)

    def head(self, hidden_RE: Tensor) -> Tensor:
        """Return the logits of the next image token, [R, V]."""
        assert self._kernels is not None, "update() must be called first"
        for part, packed in zip(self._head, self._packed_head, strict=True):
            hidden_RE = part(hidden_RE) if packed is None else self._kernels.multiply(hidden_RE, packed, part.bias)
        return hidden_RE

    @property
    def _norms(self) -> list[Any]:
        """The norms of all layers; the last norm is separate."""
        pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in self._model.layers)
        return [norm for pair in pairs for norm in pair]

    @property
    def _head_linears(self) -> list[Any]:
        return [part for part in self._head if isinstance(part, nn.Linear)]

    def _packable(self, linears: list[Any], kernels: StepKernels) -> bool:
        if self._model.config.hidden_act != "silu":
            return False
        all_linears = linears + self._head_linears
        if not are_plain(linears) or any(len(linear.weight) % kernels.panel for linear in all_linears):
            return False
        if any(norm.variance_epsilon != self._model.norm.variance_epsilon for norm in self._norms):
            return False
        needed = sum(linear.weight.nbytes for linear in all_linears)
        return bool(self._layers) or needed < free_memory(all_linears[0].weight.device) * MEMORY_SHARE


def _version(weight: Tensor) -> int:
    """Return autograd's count of in-place changes; 0 for tensors made in inference mode, which have none."""
    return 0 if weight.is_inference() else weight._version


def _sample(weights: list[Tensor]) -> Tensor:
    """Return the bits of up to SAMPLED numbers on the diagonal of each float32 matrix. A row or column gives one."""
    diagonals = (weight.detach().diagonal() for weight in weights)
    numbers = torch.cat([diagonal[:: -(-len(diagonal) // SAMPLED)] for diagonal in diagonals])
    return numbers.view(torch.int32)  # NaN differs from itself


def _pack_layer(layer: Any, kernels: StepKernels) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    return LayerWeights(
        layer.input_layernorm.weight,
        kernels.pack(qkv),
        kernels.pack(attention.o_proj.weight),
        layer.post_attention_layernorm.weight,
        # alternating panels: a thread that has both products of a column applies the gate while they are in its cache
        kernels.pack(mlp.gate_proj.weight, mlp.up_proj.weight),
        kernels.pack(mlp.down_proj.weight),
    )
