"""LlamaGen's text-to-image GPT: a Llama over image tokens, conditioned on 120 text features of a caption.

Shape legend: S positions (caption slots, then image tokens), F width of a caption feature, E width of the model,
D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import LlamaConfig, LlamaModel

CAPTION_SLOTS = 120
CAPTION_WIDTH = 2048
"""Width of flan-t5-xl, whose features encode the caption."""
PATCH = 16
"""Height and width in pixels of the patch that one image token encodes."""
IMAGE_SIZES = (256, 512)
ROTARY_BASE = 10_000
NORM_EPS = 1e-5

SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}
"""Layers, heads and width of LlamaGen's sizes."""


@dataclass(frozen=True)
class GPTConfig:
    """Sizes that determine the weights' shapes, and the size in pixels of the images the GPT was trained on."""

    layers: int
    heads: int
    width: int
    vocab_size: int
    image_size: int

    @property
    def grid(self) -> int:
        """Image tokens per row and per column."""
        return self.image_size // PATCH

    @property
    def num_image_tokens(self) -> int:
        """Image tokens per image."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads

    @property
    def feed_forward_width(self) -> int:
        """Two thirds of four times the width, rounded up to a multiple of 256."""
        return -(-(8 * self.width // 3) // 256) * 256


class LlamaGenGPT(nn.Module):
    """The GPT, built on transformers' Llama, so that all code for a Llama's layers works on it.

    Only the rotary embedding differs from a Llama's. The dropout used for training the released weights is left out.
    """

    uncond_embedding: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.caption_projection = CaptionProjection(config.width)
        self.register_buffer("uncond_embedding", torch.zeros(CAPTION_SLOTS, CAPTION_WIDTH))
        self.language_model = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.feed_forward_width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                head_dim=config.head_dim,
                max_position_embeddings=CAPTION_SLOTS + config.num_image_tokens,
                rms_norm_eps=NORM_EPS,
                use_cache=False,
            )
        )
        self.language_model.rotary_emb = GridRotary(config.grid, config.head_dim)
        self.generation_head = nn.Linear(config.width, config.vocab_size, bias=False)

    @property
    def model(self) -> LlamaGenGPT:
        """The net itself: `net.model.language_model` then works as it does for transformers' Janus."""
        return self


class CaptionProjection(nn.Module):
    """Projects caption features [..., F] to the width of the model, [..., E]."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(CAPTION_WIDTH, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Apply linear, GELU (tanh approximation), linear."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class GridRotary(nn.Module):
    """Rotary embedding of image tokens by row and column of the grid, with the interface of a Llama's `rotary_emb`.

    The first half of a head's pairs rotates with the row, the second with the column. Caption slots, positions below
    120, have cosine and sine 0, which makes their rotated queries and keys zero: a caption slot attends uniformly to
    all it may see, and every token gives all caption slots the same score, whatever their order. Angles are computed
    on each call, because a buffer would be lost on a net built on the meta device.
    """

    def __init__(self, grid: int, head_dim: int):
        super().__init__()
        assert head_dim % 4 == 0, "half of a head's pairs encode rows, half encode columns"
        self.grid = grid
        self.half_dim = head_dim // 2

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions [B, S], each [B, S, D] in the dtype of `x`, for halves as in Llama."""
        token = position_ids - CAPTION_SLOTS
        exponents = torch.arange(0, self.half_dim, 2, device=x.device).float() / self.half_dim
        frequencies = 1.0 / ROTARY_BASE**exponents
        row = (token // self.grid)[..., None] * frequencies
        column = (token % self.grid)[..., None] * frequencies
        angles = torch.cat([row, column, row, column], dim=-1)
        is_image = (token >= 0)[..., None]
        return (angles.cos() * is_image).to(x.dtype), (angles.sin() * is_image).to(x.dtype)
