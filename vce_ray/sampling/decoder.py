"""Steps many rows through image tokens over a static key-value cache.

transformers' own loop rebuilds masks, grows its cache by copying and re-reads padding at every step; this one
reads each distinct prompt once, writes each step's keys and values into place, and reads only the live part.
Prompts lie at the left of their cache rows and what a row draws follows without a gap: rows of different
lengths need no padding between them.

Shape legend: R rows (conditional, then unconditional), U distinct prompts, P prompt length, S cache slots or
positions, H key-value heads, E width of the model, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Decoder:
    """A Llama stack read straight from transformers' (or peft's) modules; one batch of rows at a time.

    Weights are never copied, so an adapter put on, merged or switched off is seen by the next batch. The cache
    is kept between batches and grows when a batch needs more rows or slots.
    """

    def __init__(self, language_model: Any):
        self._model = language_model
        self._config = language_model.config
        self._keys: list[Tensor] = []  # each [R, H, S, D]
        self._values: list[Tensor] = []
        self._rows = 0

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache holds."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @torch.no_grad()
    def begin(
        self, embeds_UPE: Tensor, lengths_U: Tensor, first_U: Tensor, of_row_R: Tensor, new_tokens: int
    ) -> Tensor:
        """Reads the prompts; returns the hidden state of each row's last token, [R, E].

        Args:
            embeds_UPE: distinct prompts, padded on the right.
            lengths_U: int64: how many places of each prompt are no padding.
            first_U: int64: the position of each prompt's first place.
            of_row_R: int64: which prompt each row continues.
            new_tokens: how many steps will follow at most.
        """
        device, width = embeds_UPE.device, embeds_UPE.shape[1]
        self._rows = len(of_row_R)
        self._reserve(self._rows, width + new_tokens)
        lengths, first = lengths_U.cpu(), first_U.cpu()
        self._live = int(lengths.max())
        self._even = bool((lengths == lengths[0]).all())
        self._next_R = lengths_U[of_row_R]
        self._first_R = first_U[of_row_R]
        places = torch.arange(int(first.max()) + width + new_tokens, device=device)
        cos, sin = self._model.rotary_emb(embeds_UPE, places[None])
        self._cos_SD, self._sin_SD = cos[0], sin[0]
        place_UP = first_U[:, None] + torch.arange(width, device=device)
        cos, sin = self._cos_SD[place_UP][:, None], self._sin_SD[place_UP][:, None]
        hidden_UPE = embeds_UPE
        for index, layer in enumerate(self._model.layers):
            query, key, value = self._project(layer, hidden_UPE)  # each [U, heads, P, D]
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            self._keys[index][: self._rows, :, :width] = key[of_row_R]
            self._values[index][: self._rows, :, :width] = value[of_row_R]
            # right padding: what follows a token never reaches it, and padding's slots are written over later
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self._grouped)
            hidden_UPE = self._finish(layer, hidden_UPE, attended)
        hidden_UE = hidden_UPE[torch.arange(len(lengths_U), device=device), lengths_U - 1]
        return _norm(self._model.norm, hidden_UE)[of_row_R]

    @torch.no_grad()
    def step(self, embeds_RE: Tensor) -> Tensor:
        """Reads one more token of each row; returns its hidden state, [R, E]."""
        self._live += 1
        slot_R, live, device = self._next_R, self._live, embeds_RE.device
        place_R = slot_R + self._first_R
        cos, sin = self._cos_SD[place_R][:, None, None], self._sin_SD[place_R][:, None, None]
        mask, row_R = None, torch.arange(self._rows, device=device)
        if not self._even:
            mask = (torch.arange(live, device=device) <= slot_R[:, None])[:, None, None]
        hidden_R1E = embeds_RE[:, None]
        for index, layer in enumerate(self._model.layers):
            query, key, value = self._project(layer, hidden_R1E)
            key = _rotate(key, cos, sin)
            keys, values = self._keys[index][: self._rows], self._values[index][: self._rows]
            if self._even:
                keys[:, :, live - 1], values[:, :, live - 1] = key[:, :, 0], value[:, :, 0]
            else:
                keys[row_R, :, slot_R], values[row_R, :, slot_R] = key[:, :, 0], value[:, :, 0]
            attended = F.scaled_dot_product_attention(
                _rotate(query, cos, sin),
                keys[:, :, :live],
                values[:, :, :live],
                attn_mask=mask,
                enable_gqa=self._grouped,
            )
            hidden_R1E = self._finish(layer, hidden_R1E, attended)
        self._next_R = slot_R + 1
        return _norm(self._model.norm, hidden_R1E[:, 0])

    @property
    def _grouped(self) -> bool:
        return self._config.num_attention_heads != self._config.num_key_value_heads

    def _reserve(self, rows: int, slots: int) -> None:
        weight = self._model.embed_tokens.weight
        if self._keys and self._keys[0].device == weight.device and self._keys[0].dtype == weight.dtype:
            if rows <= self._keys[0].shape[0] and slots <= self._keys[0].shape[2]:
                return
            rows, slots = max(rows, self._keys[0].shape[0]), max(slots, self._keys[0].shape[2])
        self._keys, self._values = [], []  # freed before the larger ones are made
        config = self._config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, slots, dim)
        for _ in self._model.layers:
            self._keys.append(weight.new_zeros(shape))
            self._values.append(weight.new_zeros(shape))

    def _project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one layer, each [rows, heads, tokens, D], not yet rotated."""
        normed, attention = _norm(layer.input_layernorm, hidden), layer.self_attn
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (projection(normed).view(shape).transpose(1, 2) for projection in projections)
        return query, key, value

    def _finish(self, layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """What a layer does after its attention: output projection and feed-forward, with their residuals."""
        merged = attended.transpose(1, 2).reshape(*hidden.shape[:2], -1)
        hidden = hidden + layer.self_attn.o_proj(merged)
        return hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))


def _norm(norm: Any, x: Tensor) -> Tensor:
    """A Llama's RMSNorm in one operation; transformers' own takes seven."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [..., D], halves paired as Llama does it."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
