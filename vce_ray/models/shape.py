"""The sizes of a model that memory and time of sampling depend on: plain arithmetic, no weights."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
"""Bytes per number, by dtype."""


@dataclass(frozen=True)
class Shape:
    """Layer sizes, sequence lengths and dtypes of a base model."""

    name: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    image_vocab: int
    image_tokens: int
    head_parameters: int
    """Parameters of the image head: from the last hidden state to the logits of an image token."""
    idle_parameters: int
    """Parameters that are loaded but not read by a step: text embedding and head, vision towers, image tokenizer, text
    encoder."""
    prompt_tokens: int = 40
    """Prompt length to plan for."""
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    """As in SamplingConfig: 'auto' is the dtype of the model."""

    @property
    def step_parameters(self) -> int:
        """Parameters read by every step."""
        return self.layers * self.layer_parameters + self.head_parameters

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.width**2 + 2 * self.width * (self.width // self.heads) * self.key_value_heads
        norms = 2 * self.width
        return attention + 3 * self.width * self.feed_forward + norms

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in one row, over all layers."""
        return 2 * self.layers * self.key_value_heads * (self.width // self.heads) * BYTES[self.cache_dtype]

    @property
    def cache_dtype(self) -> str:
        """Dtype of the keys and values."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


def _janus(name: str, layers: int, width: int, heads: int, feed_forward: int) -> Shape:
    """Janus-Pro: 102,400 text tokens (embedding and head), SigLIP-L, aligners, VQ-16 of 72 M parameters."""
    image_table = 16_384 * width
    idle = 2 * 102_400 * width + 305_000_000 + 72_000_000 + image_table + 2 * width * width
    return Shape(name, layers, width, heads, heads, feed_forward, 16_384, 576, width * width + image_table, idle)


SHAPES = {
    shape.name: shape
    for shape in (
        _janus("janus-pro-1b", 24, 2048, 16, 5632),
        _janus("janus-pro-7b", 30, 4096, 32, 11008),
        Shape("llamagen-xl-256", 36, 1280, 20, 20, 3584, 16_384, 256, 16_384 * 1280, 1_320_000_000, 120),
        Shape("llamagen-xl-512", 36, 1280, 20, 20, 3584, 16_384, 1024, 16_384 * 1280, 1_320_000_000, 120),
    )
}
"""Released models that are known by name, which begins with that of their family. Janus-Pro's feed-forward widths are
those of DeepSeek-LLM."""


def known_shape(ref: str) -> Shape | None:
    """Return the shape of a released model by its name, or by a folder or hub id that ends in it."""
    return SHAPES.get(ref.partition("@")[0].rstrip("/").rpartition("/")[2].lower())
