"""LlamaGen text-to-image as an ImageModel: a frozen T5 encodes the caption, the GPT draws, VQ-16 decodes pixels.

The shape legend is in models/base.py; F is the width of a caption feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from vce_ray.errors import UserError, quote
from vce_ray.models.base import ImageModel, PromptBatch, check_prompts, roll_rows
from vce_ray.models.checkpoint import load_complete
from vce_ray.models.folder import folder_revision
from vce_ray.models.llamagen.captions import clean_caption
from vce_ray.models.llamagen.convert import TEXT_ENCODER, load_folder
from vce_ray.models.llamagen.gpt import CAPTION_SLOTS, LlamaGenGPT
from vce_ray.models.llamagen.vq import VQModel
from vce_ray.models.prompt_tokens import PromptTokenizer


class LlamaGen(ImageModel):
    """Draws images; it cannot caption them."""

    prompt_tokens = CAPTION_SLOTS

    def __init__(self, net: LlamaGenGPT, image_tokenizer: VQModel, encoder: Any, text_tokenizer: Any, revision: str):
        self.net: Any = net
        self.image_tokenizer = image_tokenizer
        self.text_encoder = encoder
        self._tokenize = PromptTokenizer(text_tokenizer, max_tokens=CAPTION_SLOTS)
        self._pad = text_tokenizer.pad_token_id
        self.revision = revision
        self.num_image_tokens = net.config.num_image_tokens
        self.image_vocab_size = net.config.vocab_size
        self.image_size = net.config.image_size

    @classmethod
    def from_folder(cls, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaGen:
        """Load a folder written by `convert`. Raises UserError if files are missing."""
        net, image_tokenizer = load_folder(folder, device, dtype)
        encoder = load_complete(T5EncoderModel, folder / TEXT_ENCODER, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder / TEXT_ENCODER)
        encoder = encoder.to(device).eval().requires_grad_(False)
        return cls(net, image_tokenizer, encoder, tokenizer, folder_revision(folder))

    def encode_prompts(self, prompts: list[str]) -> PromptBatch:
        """Encode prompts as T5 features. Tokens after the 120th are cut off, as in LlamaGen.

        Prompts are cleaned as the captions of LlamaGen's training were (captions.py). A control token of T5 that is
        typed in a prompt is split into ordinary ones.

        Raises:
            UserError: a prompt is empty, before cleaning or after it, or longer than MAX_PROMPT_CHARS.
        """
        rows = self._tokenize(_cleaned(prompts))
        width = max(map(len, rows))
        ids_BP = torch.tensor([row + [self._pad] * (width - len(row)) for row in rows], device=self.device)
        lengths_B = torch.tensor([len(row) for row in rows], device=self.device)
        mask_BP = torch.arange(width, device=self.device) < lengths_B[:, None]
        with torch.no_grad():
            features_BPF = self.text_encoder(input_ids=ids_BP, attention_mask=mask_BP.long()).last_hidden_state
        return encode_features(self.net, roll_rows(features_BPF, lengths_B), roll_rows(mask_BP, lengths_B))

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError if a prompt is empty, before cleaning or after it, or too long. Uses no device."""
        _cleaned(prompts)

    def embed_image_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Return the input embeddings of image tokens: [B, T, E]."""
        return self.language_model.embed_tokens(tokens_BT)

    def parameters(self) -> Iterator[Tensor]:
        """Return all loaded weights."""
        return chain(self.net.parameters(), self.image_tokenizer.parameters(), self.text_encoder.parameters())

    def decode_pixels(self, tokens_BT: Tensor) -> np.ndarray:
        """Decode image tokens to images, uint8 [B, H, W, 3]."""
        return self.image_tokenizer.decode_pixels(tokens_BT.to(self.device))

    def encode_pixels(self, images: np.ndarray) -> Tensor:
        """Encode images, uint8 [B, H, W, 3], as image tokens, int64 [B, T]."""
        return self.image_tokenizer.encode_pixels(images)

    def caption(self, images: np.ndarray, question: str = "") -> list[tuple[str, bool]]:
        """Raise UserError: LlamaGen cannot read images."""
        raise UserError("LlamaGen cannot caption images: give a captioner, such as a Janus-Pro checkpoint")


def _cleaned(prompts: list[str]) -> list[str]:
    check_prompts(prompts)
    captions = [clean_caption(prompt) for prompt in prompts]
    if "" in captions:
        raise UserError(
            f"nothing is left of prompt {quote(prompts[captions.index('')])} when it is cleaned as LlamaGen cleans "
            "captions: write it in words, without links, file names or Chinese characters"
        )
    return captions


def encode_features(net: LlamaGenGPT, features_BPF: Tensor, mask_BP: Tensor) -> PromptBatch:
    """Project caption features, padded on the left, at most 120 per caption, into a PromptBatch."""
    unconditional_PE = net.caption_projection(net.uncond_embedding[CAPTION_SLOTS - mask_BP.shape[1] :])
    return PromptBatch(
        net.caption_projection(features_BPF),
        unconditional_PE.expand(len(mask_BP), -1, -1),
        mask_BP,
        CAPTION_SLOTS - mask_BP.sum(1),  # captions end at position 120, where the image begins
    )
