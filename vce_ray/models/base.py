"""What the rest of the code needs from a base model, and no more.

Shape legend of the model code: B images or prompts, P prompt length, T image tokens, V image vocabulary,
H W picture height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """Tokenised prompts, padded on the left, and the same rows with their text blanked out.

    `mask_BP` is 1 on real tokens. Unconditional rows keep the length of their prompt, as Janus does it.
    """

    ids_BP: Tensor
    mask_BP: Tensor
    unconditional_ids_BP: Tensor

    def __len__(self) -> int:
        return self.ids_BP.shape[0]


class ImageModel(Protocol):
    """An autoregressive text-to-image model with a discrete image tokenizer."""

    revision: str
    """Names weights and tokenizer: the same revision draws the same image from the same seed."""
    num_image_tokens: int
    image_vocab_size: int
    image_size: int
    """Edge of a picture in pixels."""
    net: Any
    """What is trained and what adapters are put on: a torch module whose layers no type declares."""

    def encode_prompts(self, prompts: list[str]) -> PromptBatch:
        """Tokenises prompts for drawing. Raises ValueError on an empty or overlong prompt."""
        ...

    def image_logits(self, prompts: PromptBatch, tokens_BT: Tensor, conditional: bool = True) -> Tensor:
        """Teacher-forced logits_BTV: row t is the distribution of token t given the prompt and tokens before t."""
        ...

    def decode_pixels(self, tokens_BT: Tensor) -> np.ndarray:
        """Pictures, uint8 [B, H, W, 3]."""
        ...

    def encode_pixels(self, images: np.ndarray) -> Tensor:
        """Image tokens tokens_BT of uint8 [B, H, W, 3]."""
        ...

    def caption(self, images: np.ndarray) -> list[str]:
        """One sentence for each picture of uint8 [B, H, W, 3]."""
        ...
