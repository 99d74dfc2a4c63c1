"""Run many rows through image tokens over a static key-value cache.

transformers' generation loop rebuilds masks, grows its cache by copying and reads padding again at every step. This one
reads each distinct prompt once, writes the keys and values of each step in place, and reads only the used part of the
cache. A prompt starts at slot 0 of its row and the drawn tokens follow without a gap, so rows of different lengths need
no padding between prompt and image, and rows may join and leave at any step.

Shape legend: R rows, U distinct prompts, P prompt length, S cache slots or positions, H query heads, K key-value heads,
E width of the model, D width of a head.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vce_ray.sampling.layers import (
    attend_to_cache,
    finish_layer,
    head_width,
    negate_left_half,
    project_qkv,
    rms_norm,
    rotate,
)
from vce_ray.sampling.memory import SLOT_BLOCK, round_up_slots
from vce_ray.sampling.packed import PackedStack

if TYPE_CHECKING:
    from vce_ray.config import SamplingConfig
    from vce_ray.models.base import ImageModel

Captured = TypeVar("Captured")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of one step: takes a layer's projections and its cache, writes the new keys and values, attends."""
MAX_CAPTURED_STEPS = 16
"""Captured steps that are kept, one per batch size and sampling settings."""


class Decoder:
    """A Llama stack and its image head, read from modules of transformers or peft; one set of rows at a time.

    The next rows see an adapter that was added, merged or switched off while no row was in progress. The cache is kept
    between batches, and reallocated when more rows or slots are needed.

    All rows belong to one batch, which calls `start_batch` before it touches them and `end_batch` when it has none
    left. In between, no other batch may start.
    """

    def __init__(self, language_model: Any, head: list[Any]):
        self._model, self._head = language_model, nn.Sequential(*head)
        self._packed = PackedStack(language_model, head)
        self.uses_compiled_step = False
        """Whether the rows in progress are stepped by the compiled function for CPUs (packed.py)."""
        self.cache_dtype: torch.dtype | None = None
        """Dtype of keys and values; None is the model's own. Change it only while no row is in progress."""
        self._keys: list[Tensor] = []  # one [R, K, S, D] per layer
        self._values: list[Tensor] = []
        self.next_slot_R = self.first_R = torch.empty(0, dtype=torch.int64)
        """int64: the slot that the next token of each row is written to, and the position of the row's slot 0."""
        self._used_R = torch.empty(0, dtype=torch.int64)
        """Copy of `next_slot_R` on the host: reading that one would wait for the GPU."""
        self.cos_SD = self.sin_SD = torch.empty(0, 0)
        """Rotary embedding by position. The sines of the left half are negated (see `rotate`)."""
        self.captured_steps: dict[Any, Any] = {}
        """Captured steps (captured.py), by batch size and sampling settings, oldest first."""
        self._lock = threading.Lock()
        """Held while the owner is checked and changed: two threads may start batches at once."""
        self._owner: weakref.ref[object] | None = None
        """The batch that the rows belong to. Weak, so that a batch that was dropped half-way blocks no other."""
        self._addresses: list[int] = []
        self._capture_resources: tuple[torch.cuda.Stream, Any] | None = None
        config = language_model.config
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = head_width(config)

    def start_batch(self, batch: object) -> None:
        """Make `batch` the owner of all rows, dropping those left by a batch that no longer exists.

        Does nothing if it is the owner already.

        Raises:
            RuntimeError: another batch is the owner.
        """
        with self._lock:
            owner = self._owner and self._owner()
            if owner is batch:
                return
            if owner is not None:
                raise RuntimeError(
                    "a model serves one batch at a time, and another batch of this model has images in progress: "
                    "finish that one or drop its images first, or load the model twice"
                )
            self.keep([])
            self._owner = weakref.ref(batch)

    def end_batch(self, batch: object) -> None:
        """Drop all rows and let other batches start. Does nothing if `batch` is not the owner."""
        with self._lock:
            if self._owner and self._owner() is batch:
                self._owner = None
                self.keep([])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @property
    def slots(self) -> int:
        """Slots of the cache; 0 if there is none."""
        return self._keys[0].shape[2] if self._keys else 0

    def whole_slots(self, slots: int) -> int:
        """Return the slots that a cache is allocated with if this many are needed."""
        return round_up_slots(slots, SLOT_BLOCK if self._model.embed_tokens.weight.device.type == "cuda" else 1)

    def release(self) -> None:
        """Free the cache. No row may be in progress."""
        self.captured_steps.clear()
        self._keys, self._values = [], []

    @property
    def rows(self) -> int:
        """Number of rows in progress."""
        return len(self.next_slot_R)

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Return the logits of the next image token, float32 [R, V]."""
        return (self._packed.head(hidden_RE) if self.uses_compiled_step else self._head(hidden_RE)).float()

    def prepare(self) -> None:
        """Pack the weights if the compiled step can be used, so that memory measured afterwards is free for drawing."""
        self.uses_compiled_step = self.cache_dtype is None and self._packed.update()

    def cache(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return views of each layer's keys and values, [rows, K, S, D], valid until the cache is reallocated."""
        return [keys[:rows] for keys in self._keys], [values[:rows] for values in self._values]

    def captured_step(self, images: int, sampling: SamplingConfig, capture: Callable[[], Captured]) -> Captured:
        """Return the captured step for a batch size, made by `capture` on first use.

        The latest MAX_CAPTURED_STEPS are kept.
        """
        # A graph reads weights at the addresses it was captured with. An in-place change keeps them; a weight that
        # moved, as one does when its `.data` is assigned, makes every graph stale.
        parameters = (*self._model.parameters(), *self._head.parameters())
        if (addresses := [parameter.data_ptr() for parameter in parameters]) != self._addresses:
            self.captured_steps.clear()
        key = (images, sampling.model_copy(update={"batch_size": 1}))
        if key not in self.captured_steps:
            if len(self.captured_steps) == MAX_CAPTURED_STEPS:
                self.captured_steps.pop(next(iter(self.captured_steps)))
            self.captured_steps[key] = capture()
            addresses = [parameter.data_ptr() for parameter in parameters]  # the first capture joins matrices
        self._addresses = addresses
        return self.captured_steps[key]

    def capture_resources(self) -> tuple[torch.cuda.Stream, Any]:
        """Return the stream that steps are captured on, and the memory pool that their graphs share."""
        if self._capture_resources is None:
            stream = torch.cuda.Stream(self._model.embed_tokens.weight.device)
            self._capture_resources = stream, torch.cuda.graph_pool_handle()
        return self._capture_resources

    @torch.no_grad()
    def join(
        self,
        embeds_UPE: Tensor,
        lengths_U: Tensor,
        first_U: Tensor,
        prompt_of_row_R: Tensor,
        new_tokens: int,
        spare_rows: int = 0,
    ) -> Tensor:
        """Read the prompts of additional rows; return the hidden state of each row's last prompt token, [R, E].

        Args:
            embeds_UPE: distinct prompts, padded on the right.
            lengths_U: int64: length of each prompt without padding.
            first_U: int64: position of each prompt's first token.
            prompt_of_row_R: int64: the prompt that each row continues.
            new_tokens: the most steps that will follow.
            spare_rows: further rows that the cache must have room for.
        """
        device, width, before = embeds_UPE.device, embeds_UPE.shape[1], self.rows
        rows, lengths, first = before + len(prompt_of_row_R), lengths_U.cpu(), first_U.cpu()
        self._reserve(rows + spare_rows, width + new_tokens)
        self._tabulate(int(first.max()) + width + new_tokens)
        self._used_R = torch.cat([self._used_R, lengths[prompt_of_row_R.cpu()]])
        # The old tensors are on another device only if the model was moved, and then they are empty.
        self.next_slot_R, self.first_R = (
            torch.cat([old.to(device), new[prompt_of_row_R]])
            for old, new in ((self.next_slot_R, lengths_U), (self.first_R, first_U))
        )
        position_UP = first_U[:, None] + torch.arange(width, device=device)
        cos, sin = self.cos_SD[position_UP][:, :, None], self.sin_SD[position_UP][:, :, None]
        hidden_UPE = embeds_UPE
        self.prepare()
        if self.uses_compiled_step:
            self._packed.set_cache(*self.cache(rows))
        for layer, keys, values in zip(self._model.layers, *self.cache(rows), strict=True):
            query, key, value = self._split(project_qkv(layer, hidden_UPE), cos, sin)  # each [U, P, heads, D]
            keys[before:, :, :width] = key.transpose(1, 2)[prompt_of_row_R]  # casts to the dtype of the cache
            values[before:, :, :width] = value.transpose(1, 2)[prompt_of_row_R]
            # Padding is on the right, where the causal mask hides it, so prompts of different lengths need no other
            # mask. What padding writes into the cache is overwritten by drawn tokens before it is ever read.
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                enable_gqa=self._heads != self._key_heads,
            )
            hidden_UPE = finish_layer(layer, hidden_UPE, attended.transpose(1, 2).flatten(2))
        hidden_UE = hidden_UPE[torch.arange(len(lengths_U), device=device), lengths_U - 1]
        return rms_norm(self._model.norm, hidden_UE)[prompt_of_row_R]

    @torch.no_grad()
    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, which become rows 0, 1, ... in this order. Rows that move are copied."""
        moved = [target for target, row in enumerate(rows) if target != row]
        kept, used = torch.tensor(rows, dtype=torch.int64), self._used_slots
        sources = [rows[target] for target in moved]
        if moved:
            for cached in (*self._keys, *self._values):
                cached[moved, :, :used] = cached[sources, :, :used]
        self._used_R = self._used_R[kept]
        self.next_slot_R, self.first_R = (old[kept.to(old.device)] for old in (self.next_slot_R, self.first_R))

    @torch.no_grad()
    def step(self, embeds_RE: Tensor) -> Tensor:
        """Read one more token of each row; return its hidden state, [R, E]."""
        if self.uses_compiled_step:
            hidden_RE = self._packed.step(embeds_RE, (self.cos_SD, self.sin_SD, self.next_slot_R, self.first_R))
        else:
            hidden_RE, attend = embeds_RE, self._attention()
            for layer, keys, values in zip(self._model.layers, *self.cache(len(embeds_RE)), strict=True):
                attended = attend(project_qkv(layer, hidden_RE), keys, values)
                hidden_RE = finish_layer(layer, hidden_RE, attended)
            hidden_RE = rms_norm(self._model.norm, hidden_RE)
        self.advance(1)
        return hidden_RE

    def advance(self, steps: int) -> None:
        """Count tokens of each row whose keys and values have been written to the cache."""
        self.next_slot_R, self._used_R = self.next_slot_R + steps, self._used_R + steps

    def look_ahead(self, embeds_RE: Tensor) -> Tensor:
        """Return what `step` would return, without counting the token: the next step overwrites its keys and values."""
        hidden_RE = self.step(embeds_RE)
        self.advance(-1)
        return hidden_RE

    @property
    def _used_slots(self) -> int:
        """Slots in use in the longest row."""
        return int(self._used_R.max()) if self.rows else 0

    def _attention(self) -> Attention:
        """Return the attention of the next step with torch's operators."""
        slot_R, live = self.next_slot_R, self._used_slots + 1
        row_R, position_R = torch.arange(self.rows, device=slot_R.device), slot_R + self.first_R
        cos, sin = self.cos_SD[position_R][:, None], self.sin_SD[position_R][:, None]
        # Rows of one length, the usual case, need no mask and are written as one slice instead of by index.
        unused_R11S, same_length = None, bool((self._used_R == live - 1).all())
        if not same_length:
            unused_R11S = (torch.arange(live, device=slot_R.device) > slot_R[:, None])[:, None, None]

        def attend(projected: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            query, key, value = self._split(projected, cos, sin)  # each [R, heads, D]
            if same_length:
                keys[:, :, live - 1], values[:, :, live - 1] = key, value
            else:
                keys[row_R, :, slot_R], values[row_R, :, slot_R] = key.to(keys.dtype), value.to(keys.dtype)
            live_keys, live_values = (cached[:, :, :live].to(query.dtype) for cached in (keys, values))
            return attend_to_cache(query, live_keys, live_values, unused_R11S)

        return attend

    def _split(self, projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split projections [..., heads * D] into rotated queries, rotated keys, and values: each [..., heads, D]."""
        projected = projected.unflatten(-1, (-1, self._head_dim))
        rotated = rotate(projected[..., : self._heads + self._key_heads, :], cos, sin)
        return rotated[..., : self._heads, :], rotated[..., self._heads :, :], projected[..., -self._key_heads :, :]

    def _reserve(self, rows: int, slots: int) -> None:
        """Make the cache large enough, carrying over the part in use."""
        weight, used = self._model.embed_tokens.weight, self._used_slots
        cache_dtype = self.cache_dtype or weight.dtype
        if self._keys and (self._keys[0].device, self._keys[0].dtype) == (weight.device, cache_dtype):
            held_rows, _, held_slots, _ = self._keys[0].shape
            if rows <= held_rows and slots <= held_slots:
                return
            if used:
                slots = max(slots, held_slots)
        self.captured_steps.clear()  # their graphs hold the addresses of the old cache
        slots = self.whole_slots(slots)
        shape = (rows, self._key_heads, slots, self._head_dim)
        layers, new = len(self._model.layers), []
        # Old and new cache never exist together: each old tensor is freed once its part in use is copied, and all of
        # them before the first allocation if no row is in progress. If an allocation fails, the decoder has no cache
        # rather than half of one.
        old = [*self._keys, *self._values] if used else []
        self._keys, self._values = [], []
        for i in range(2 * layers):
            new.append(weight.new_zeros(shape, dtype=cache_dtype))
            if used:
                new[i][: self.rows, :, :used] = old[i][: self.rows, :, :used]
                old[i] = weight.new_empty(0)
        self._keys, self._values = new[:layers], new[layers:]

    def _tabulate(self, positions: int) -> None:
        """Tabulate cosines and sines of the first positions, once for all batches."""
        weight = self._model.embed_tokens.weight
        if len(self.cos_SD) >= positions and self.cos_SD.device == weight.device and self.cos_SD.dtype == weight.dtype:
            return
        position_1S = torch.arange(round_up_slots(positions, SLOT_BLOCK), device=weight.device)[None]
        cos, sin = self._model.rotary_emb(weight, position_1S)
        self.cos_SD, self.sin_SD = cos[0], negate_left_half(sin[0])
        self.captured_steps.clear()  # their graphs hold the addresses of the old tables


_decoders: WeakKeyDictionary[ImageModel, Decoder] = WeakKeyDictionary()
_decoders_lock = threading.Lock()


def decoder_of(model: ImageModel) -> Decoder:
    """Return the decoder of a model, made on first use and kept with its cache for as long as the model lives."""
    with _decoders_lock:  # two threads must not make one each: their batches would not exclude each other
        decoder = _decoders.get(model)
        if decoder is None:
            # A decoder refers to the modules of its model but never to the ImageModel: as the value of a weak key it
            # must not, or a dropped model's weights and cache would stay in memory.
            decoder = _decoders[model] = Decoder(model.language_model, model.image_head_parts)
        return decoder
