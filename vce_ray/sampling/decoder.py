"""Steps many rows through image tokens over a static key-value cache.

transformers' own loop rebuilds masks, grows its cache by copying and re-reads padding at every step; this one
prefills each distinct prompt once, writes each step's keys and values into place, and reads only the live part.
Prompts lie at the left of their cache rows, so a row's next slot is its position: rows of different lengths
(and rows that started at different steps) need no padding between them.

Shape legend: R rows (conditional, then unconditional), U distinct prompts, P prompt length, S cache slots,
H key-value heads, E width of the model, D width of a head.
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

    @torch.no_grad()
    def begin(self, ids_RP: Tensor, lengths_R: Tensor, new_tokens: int) -> Tensor:
        """Reads the prompts; returns the hidden state of each row's last token, [R, E].

        Args:
            ids_RP: token ids, padded on the right.
            lengths_R: number of real tokens of each row, on the CPU.
            new_tokens: how many steps will follow at most.
        """
        width = ids_RP.shape[1]
        distinct, of_row = torch.unique(
            torch.cat([lengths_R.to(ids_RP.device)[:, None], ids_RP], dim=1), dim=0, return_inverse=True
        )
        self._reserve(len(ids_RP), width + new_tokens)
        self._rows = len(ids_RP)
        self._next_R = lengths_R.to(ids_RP.device)
        self._live = int(lengths_R.max())
        self._even = bool((lengths_R == lengths_R[0]).all())
        slots = torch.arange(width + new_tokens, device=ids_RP.device)
        cos, sin = self._model.rotary_emb(self._keys[0], slots[None])
        self._cos_SD, self._sin_SD = cos[0], sin[0]
        hidden_UPE = self._model.embed_tokens(distinct[:, 1:])
        for index, layer in enumerate(self._model.layers):
            query, key, value = self._project(layer, hidden_UPE)  # each [U, heads, P, D]
            cos, sin = self._cos_SD[:width], self._sin_SD[:width]
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            self._keys[index][: self._rows, :, :width] = key[of_row]
            self._values[index][: self._rows, :, :width] = value[of_row]
            # right padding: what follows a token never reaches it, and padding's slots are written over later
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self._grouped)
            hidden_UPE = self._finish(layer, hidden_UPE, attended)
        last_U = distinct[:, 0] - 1
        hidden_UE = hidden_UPE[torch.arange(len(distinct), device=last_U.device), last_U]
        return self._model.norm(hidden_UE)[of_row]

    @torch.no_grad()
    def step(self, embeds_RE: Tensor) -> Tensor:
        """Reads one more token of each row; returns its hidden state, [R, E]."""
        self._live += 1
        slot_R, live = self._next_R, self._live
        cos, sin = self._cos_SD[slot_R][:, None, None], self._sin_SD[slot_R][:, None, None]
        mask = None
        if not self._even:
            mask = (torch.arange(live, device=slot_R.device) <= slot_R[:, None])[:, None, None]
        row_R = torch.arange(self._rows, device=slot_R.device)
        hidden_R1E = embeds_RE[:, None]
        for index, layer in enumerate(self._model.layers):
            query, key, value = self._project(layer, hidden_R1E)
            keys, values = self._keys[index], self._values[index]
            keys[row_R, :, slot_R] = _rotate(key, cos, sin)[:, :, 0]
            values[row_R, :, slot_R] = value[:, :, 0]
            attended = F.scaled_dot_product_attention(
                _rotate(query, cos, sin),
                keys[: self._rows, :, :live],
                values[: self._rows, :, :live],
                attn_mask=mask,
                enable_gqa=self._grouped,
            )
            hidden_R1E = self._finish(layer, hidden_R1E, attended)
        self._next_R = slot_R + 1
        return self._model.norm(hidden_R1E[:, 0])

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
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (projection(normed).view(shape).transpose(1, 2) for projection in projections)
        return query, key, value

    def _finish(self, layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """What a layer does after its attention: output projection and feed-forward, with their residuals."""
        merged = attended.transpose(1, 2).reshape(*hidden.shape[:2], -1)
        hidden = hidden + layer.self_attn.o_proj(merged)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [..., D], halves paired as Llama does it."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
