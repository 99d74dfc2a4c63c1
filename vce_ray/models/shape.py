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
        attention = 2 * self.width**2 + 2 * self.width * (self.width // self.heads) * self.key_value_heads
        norms = 2 * self.width
        return self.layers * (attention + 3 * self.width * self.feed_forward + norms) + self.head_parameters

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in one row, over all layers."""
        return 2 * self.layers * self.key_value_heads * (self.width // self.heads) * BYTES[self.cache_dtype]

    @property
    def cache_dtype(self) -> str:
        """Dtype of the keys and values."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
