"""Steps many rows through image tokens over a static key-value cache.

transformers' own loop rebuilds masks, grows its cache by copying and re-reads padding at every step; this one
reads each distinct prompt once, writes each step's keys and values into place, and reads only the live part.
Prompts lie at the left of their cache rows and what a row draws follows without a gap: rows of different
lengths need no padding between them, and rows may join and leave at any step.

Shape legend: R rows, U distinct prompts, P prompt length, S cache slots or positions, H key-value heads, E width of
the model, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vce_ray.sampling.compiled import compiled_for
from vce_ray.sampling.layers import finish, norm, project
from vce_ray.sampling.packed import PackedStack
from vce_ray.sampling.plan import SLOT_BLOCK, whole_slots

if TYPE_CHECKING:
    from vce_ray.config import SamplingConfig
    from vce_ray.models.base import ImageModel
    from vce_ray.sampling.captured import CapturedStep

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a step: takes a layer's projections and its cache, writes the tokens' keys and values into it, attends."""
CAPTURES = 16
"""How many captured steps are kept, for as many batch sizes and ways of sampling."""


class Decoder:
    """A Llama stack and its image head, read from transformers' (or peft's) modules; one set of rows at a time.

    An adapter put on, merged or switched off while no row is underway is seen by the next ones. The cache is kept
    between batches, and made anew when more rows or slots are needed.
    """

    def __init__(self, language_model: Any, head: list[Any]):
        self._model, self._head = language_model, nn.Sequential(*head)
        self._packed, self._is_packed = PackedStack(language_model, head), False
        self.kept_dtype: torch.dtype | None = None
        """Of keys and values, where it is not the model's own; to be changed while no row is underway."""
        self._keys: list[Tensor] = []  # each [R, H, S, D]
        self._values: list[Tensor] = []
        self.next_R = self.first_R = torch.empty(0, dtype=torch.int64)
        """The slot into which the next token of each row goes, and the position of its first slot: int64."""
        self._used_R = torch.empty(0, dtype=torch.int64)
        """What `next_R` is, known to the host."""
        self.cos_SD = self.sin_SD = torch.empty(0, 0)
        """The rotary embedding by position; the sines have the sign of the half that they fall on."""
        self._captures: dict[Any, CapturedStep] = {}
        self._addresses: list[int] = []
        self._capturing: tuple[torch.cuda.Stream, Any] | None = None
        config = language_model.config
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache holds."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @property
    def slots(self) -> int:
        """Slots of the cache that is held; 0 where none is."""
        return self._keys[0].shape[2] if self._keys else 0

    def whole_slots(self, slots: int) -> int:
        """How many slots the cache has where so many are needed."""
        return whole_slots(slots, SLOT_BLOCK if self._model.embed_tokens.weight.device.type == "cuda" else 1)

    def release(self) -> None:
        """Gives the cache back; no row may be underway."""
        self._captures.clear()
        self._keys, self._values = [], []

    @property
    def rows(self) -> int:
        """Rows that are underway."""
        return len(self.next_R)

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Logits of the next image token, float32 [R, V]."""
        return (self._packed.head(hidden_RE) if self._is_packed else self._head(hidden_RE)).float()

    def prepare(self) -> None:
        """Packs the weights where that is to be done, so that what is free afterwards is free for drawing."""
        self._is_packed = self.kept_dtype is None and self._packed.update()

    def cache(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, [rows, H, S, D]: views, which hold until a batch needs more."""
        return [keys[:rows] for keys in self._keys], [values[:rows] for values in self._values]

    def captured(self, model: ImageModel, pictures: int, sampling: SamplingConfig) -> CapturedStep:
        """The step for so many pictures, captured when it is first drawn with; the latest few are kept."""
        from vce_ray.sampling.captured import CapturedStep  # Triton, which only machines with a GPU need

        read = (*self._model.parameters(), *model.image_head.parameters())
        if (addresses := [parameter.data_ptr() for parameter in read]) != self._addresses:
            self._captures.clear()
        key = (pictures, sampling.model_copy(update={"batch_size": 1}))
        if key not in self._captures:
            if len(self._captures) == CAPTURES:
                self._captures.pop(next(iter(self._captures)))
            self._captures[key] = CapturedStep(model, pictures, sampling)
            addresses = [parameter.data_ptr() for parameter in read]  # joined by the first capture
        self._addresses = addresses
        return self._captures[key]

    def capturing(self) -> tuple[torch.cuda.Stream, Any]:
        """The stream on which steps are captured, and the memory pool that their graphs share."""
        if self._capturing is None:
            self._capturing = torch.cuda.Stream(self._model.embed_tokens.weight.device), torch.cuda.graph_pool_handle()
        return self._capturing

    @torch.no_grad()
    def join(
        self,
        embeds_UPE: Tensor,
        lengths_U: Tensor,
        first_U: Tensor,
        of_row_R: Tensor,
        new_tokens: int,
        spare_rows: int = 0,
    ) -> Tensor:
        """Reads the prompts of more rows; returns the hidden state of each one's last token, [R, E].

        Args:
            embeds_UPE: distinct prompts, padded on the right.
            lengths_U: int64: how many places of each prompt are no padding.
            first_U: int64: the position of each prompt's first place.
            of_row_R: int64: which prompt each row continues.
            new_tokens: how many steps will follow at most.
            spare_rows: for how many rows more the cache shall have room.
        """
        device, width, before = embeds_UPE.device, embeds_UPE.shape[1], self.rows
        rows, lengths, first = before + len(of_row_R), lengths_U.cpu(), first_U.cpu()
        self._reserve(rows + spare_rows, width + new_tokens)
        self._tabulate(int(first.max()) + width + new_tokens)
        self._used_R = torch.cat([self._used_R, lengths[of_row_R.cpu()]])
        # where these lie on another device they are of a batch before, of which nothing is left
        self.next_R, self.first_R = (
            torch.cat([of.to(device), more[of_row_R]])
            for of, more in ((self.next_R, lengths_U), (self.first_R, first_U))
        )
        place_UP = first_U[:, None] + torch.arange(width, device=device)
        cos, sin = self.cos_SD[place_UP][:, :, None], self.sin_SD[place_UP][:, :, None]
        hidden_UPE = embeds_UPE
        self.prepare()
        if self._is_packed:
            self._packed.begin(*self.cache(rows))
        for layer, keys, values in zip(self._model.layers, *self.cache(rows), strict=True):
            query, key, value = self._split(project(layer, hidden_UPE), cos, sin)  # each [U, P, heads, D]
            keys[before:, :, :width] = key.transpose(1, 2)[of_row_R]  # copies, into the cache's dtype
            values[before:, :, :width] = value.transpose(1, 2)[of_row_R]
            # right padding: what follows a token never reaches it, and padding's slots are written over later
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                enable_gqa=self._heads != self._key_heads,
            )
            hidden_UPE = finish(layer, hidden_UPE, attended.transpose(1, 2).flatten(2))
        hidden_UE = hidden_UPE[torch.arange(len(lengths_U), device=device), lengths_U - 1]
        return norm(self._model.norm, hidden_UE)[of_row_R]

    @torch.no_grad()
    def keep(self, rows: list[int]) -> None:
        """Forgets all rows but these, which are rows 0, 1, ... from now on; those that move are copied."""
        moved = [place for place, row in enumerate(rows) if place != row]
        kept, live = torch.tensor(rows, dtype=torch.int64), self._live
        sources = [rows[place] for place in moved]
        if moved:
            for cached in (*self._keys, *self._values):
                cached[moved, :, :live] = cached[sources, :, :live]
        self._used_R = self._used_R[kept]
        self.next_R, self.first_R = (of[kept.to(of.device)] for of in (self.next_R, self.first_R))

    @torch.no_grad()
    def step(self, embeds_RE: Tensor) -> Tensor:
        """Reads one more token of each row; returns its hidden state, [R, E]."""
        place = self.cos_SD, self.sin_SD, self.next_R, self.first_R
        if self._is_packed:
            hidden_RE = self._packed.step(embeds_RE, place)
        else:
            attend = self._compiled_attention(embeds_RE) or self._plain_attention()
            hidden_RE = embeds_RE
            for layer, keys, values in zip(self._model.layers, *self.cache(len(embeds_RE)), strict=True):
                hidden_RE = finish(layer, hidden_RE, attend(project(layer, hidden_RE), keys, values))
            hidden_RE = norm(self._model.norm, hidden_RE)
        self.advance(1)
        return hidden_RE

    def advance(self, steps: int) -> None:
        """Takes note of so many tokens of each row, which lie in the cache."""
        self.next_R, self._used_R = self.next_R + steps, self._used_R + steps

    def look_ahead(self, embeds_RE: Tensor) -> Tensor:
        """What `step` would return, without taking it: the token's keys and values are written again by the step."""
        hidden_RE = self.step(embeds_RE)
        self.advance(-1)
        return hidden_RE

    @property
    def _live(self) -> int:
        """Slots that are in use, of the row that has most."""
        return int(self._used_R.max()) if self.rows else 0

    def _compiled_attention(self, embeds_RE: Tensor) -> Attention | None:
        kernels = compiled_for(embeds_RE, self.cos_SD, self._keys[0])
        place = self.cos_SD, self.sin_SD, self.next_R, self.first_R
        return kernels and (lambda projected, keys, values: kernels.attend(projected, *place, keys, values))

    def _plain_attention(self) -> Attention:
        slot_R, live = self.next_R, self._live + 1
        row_R, place_R = torch.arange(self.rows, device=slot_R.device), slot_R + self.first_R
        cos, sin = self.cos_SD[place_R][:, None], self.sin_SD[place_R][:, None]
        unseen_R11S, even = None, bool((self._used_R == live - 1).all())
        if not even:
            unseen_R11S = (torch.arange(live, device=slot_R.device) > slot_R[:, None])[:, None, None]

        def attend(projected: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            query, key, value = self._split(projected, cos, sin)  # each [R, heads, D]
            if even:
                keys[:, :, live - 1], values[:, :, live - 1] = key, value
            else:
                keys[row_R, :, slot_R], values[row_R, :, slot_R] = key.to(keys.dtype), value.to(keys.dtype)
            seen_keys, seen_values = (cached[:, :, :live].to(query.dtype) for cached in (keys, values))
            return _attend(query, seen_keys, seen_values, unseen_R11S)

        return attend

    def _split(self, projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: each [..., heads, D] of projections [..., heads * D]."""
        projected = projected.unflatten(-1, (-1, self._head_dim))
        turned = _rotate(projected[..., : self._heads + self._key_heads, :], cos, sin)
        return turned[..., : self._heads, :], turned[..., self._heads :, :], projected[..., -self._key_heads :, :]

    def _reserve(self, rows: int, slots: int) -> None:
        """Makes the cache large enough; what is in use of it is carried over."""
        weight, live = self._model.embed_tokens.weight, self._live
        kept_dtype = self.kept_dtype or weight.dtype
        if self._keys and (self._keys[0].device, self._keys[0].dtype) == (weight.device, kept_dtype):
            held_rows, _, held_slots, _ = self._keys[0].shape
            if rows <= held_rows and slots <= held_slots:
                return
            if live:
                slots = max(slots, held_slots)
        self._captures.clear()
        slots = self.whole_slots(slots)
        shape = (rows, self._key_heads, slots, self._head_dim)
        layers, made = len(self._model.layers), []
        held = [*self._keys, *self._values] if live else []
        self._keys, self._values = [], []  # what is not in use is freed first; there are new ones only if all are made
        for i in range(2 * layers):
            made.append(weight.new_zeros(shape, dtype=kept_dtype))
            if live:
                made[i][: self.rows, :, :live] = held[i][: self.rows, :, :live]
                held[i] = weight.new_empty(0)  # freed before the next one is made
        self._keys, self._values = made[:layers], made[layers:]

    def _tabulate(self, places: int) -> None:
        """Cosines and sines of the first positions, once for all batches."""
        weight = self._model.embed_tokens.weight
        if len(self.cos_SD) >= places and self.cos_SD.device == weight.device and self.cos_SD.dtype == weight.dtype:
            return
        cos, sin = self._model.rotary_emb(
            weight, torch.arange(whole_slots(places, SLOT_BLOCK), device=weight.device)[None]
        )
        self.cos_SD, self.sin_SD = cos[0], _signed_by_half(sin[0])
        self._captures.clear()


def _attend(query_RHD: Tensor, keys_RKSD: Tensor, values_RKSD: Tensor, unseen_R11S: Tensor | None) -> Tensor:
    """One query of each row over the live cache: [R, H * D]. Heads that share keys (H > K) are neighbours.

    Two batched products: on CPUs a third faster than torch's fused attention, which splits long queries, not rows.
    """
    query = query_RHD.unflatten(1, (keys_RKSD.shape[1], -1)).flatten(0, 1)  # [R K, H / K, D]
    keys, values = keys_RKSD.flatten(0, 1), values_RKSD.flatten(0, 1)
    scale = query_RHD.shape[-1] ** -0.5
    scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=scale)
    if unseen_R11S is not None:
        scores.unflatten(0, (len(query_RHD), -1)).masked_fill_(unseen_R11S, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(len(query_RHD), -1)


def _signed_by_half(sin: Tensor) -> Tensor:
    """The sines of a rotation with the sign of the half that they fall on."""
    left, right = sin.chunk(2, dim=-1)
    return torch.cat((-left, right), dim=-1)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding of [..., D], halves paired as Llama does it."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), signed_sin)
