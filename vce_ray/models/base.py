"""The protocol of a base model: everything that the rest of the code needs from one.

Shape legend of the model code: B images or prompts, P prompt length, T image tokens, S = P + T - 1 positions,
V image vocabulary, E width of the language model, H W image height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vce_ray.errors import UserError
from vce_ray.models.shape import Shape

MAX_PROMPT_CHARS = 2000
"""Prompts are untrusted input: a longer one is rejected before it takes memory."""


@dataclass(frozen=True)
class PromptBatch:
    """Embedded prompts, padded on the left, with and without their text."""

    embeds_BPE: Tensor
    unconditional_BPE: Tensor
    """The same rows without the text: they depend only on the lengths of the prompts."""
    mask_BP: Tensor
    """bool: False for padding."""
    first_B: Tensor
    """int64: position of each prompt's first token, for the rotary embedding."""

    def __len__(self) -> int:
        return len(self.mask_BP)

    def rows(self, index: Tensor) -> PromptBatch:
        """Select prompts by index."""
        return PromptBatch(
            self.embeds_BPE[index], self.unconditional_BPE[index], self.mask_BP[index], self.first_B[index]
        )

    def blanked(self, blank: list[bool]) -> PromptBatch:
        """Return the same prompts, those with `blank` without their text."""
        blank_B11 = torch.tensor(blank, device=self.mask_BP.device)[:, None, None]
        embeds = torch.where(blank_B11, self.unconditional_BPE, self.embeds_BPE)
        return PromptBatch(embeds, self.unconditional_BPE, self.mask_BP, self.first_B)


class ImageModel(ABC):
    """An autoregressive text-to-image model: a Llama that continues a prompt with image tokens, and an image tokenizer.

    Subclasses have the class method `from_folder(folder, device, dtype)`, set the attributes below and implement the
    abstract methods.
    """

    net: Any
    """The torch module that is trained and that adapters are added to, with `model.language_model` and
    `model.generation_head`. Any: its layers are attributes that no type declares."""
    ref: str
    """What it was loaded by: EMBEDDED, a folder, a store's URI or a hub id. Set by `load_model`."""
    revision: str
    """Hash of weights, tokenizer and the form of prompts: the same revision draws the same image from the same seed."""
    num_image_tokens: int
    image_vocab_size: int
    image_size: int
    """Height and width of an image in pixels."""
    prompt_tokens = 40
    """Prompt length that memory is planned for; most prompts are shorter."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> PromptBatch:
        """Tokenize and embed prompts for sampling. Raises UserError if a prompt is empty or too long."""

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError if a prompt is empty or too long to be drawn. Uses no device."""
        check_prompts(prompts)

    @abstractmethod
    def embed_image_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Return the input embeddings of image tokens: [B, T, E]."""

    @abstractmethod
    def decode_pixels(self, tokens_BT: Tensor) -> np.ndarray:
        """Decode image tokens to images, uint8 [B, H, W, 3]."""

    @abstractmethod
    def caption(self, images: np.ndarray, question: str = "") -> list[tuple[str, bool]]:
        """Caption images, uint8 [B, H, W, 3]. Raises UserError if the model cannot read images.

        Args:
            question: what to ask about each. Ignored by models that know one question only; '' asks for a sentence.

        Returns:
            Each answer, and whether the model has ended it. If not, it was cut off at the limit of tokens.
        """

    def encode_pixels(self, images: np.ndarray) -> Tensor:
        """Encode images, uint8 [B, H, W, 3], as image tokens, int64 [B, T]. Optional: erasing does not need it."""
        raise NotImplementedError(f"{type(self).__name__} does not encode images")

    @property
    def language_model(self) -> Any:
        """The Llama, whether or not peft has wrapped its layers."""
        return self.net.model.language_model

    @property
    def image_head(self) -> Any:
        """Module from hidden states [..., E] to logits of the next image token [..., V]."""
        return self.net.model.generation_head

    @property
    def image_head_parts(self) -> list[Any]:
        """The modules of the image head, in the order it applies them."""
        return [self.image_head]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.language_model.embed_tokens.weight.device

    def parameters(self) -> Iterator[Tensor]:
        """Return all loaded weights."""
        return self.net.parameters()

    @cached_property
    def shape(self) -> Shape:
        """Layer sizes and parameter counts, which memory and time of sampling depend on."""
        config = self.language_model.config
        shape = Shape(
            name=self.revision,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            feed_forward=config.intermediate_size,
            image_vocab=self.image_vocab_size,
            image_tokens=self.num_image_tokens,
            head_parameters=sum(p.numel() for p in self.image_head.parameters()),
            idle_parameters=0,
            prompt_tokens=self.prompt_tokens,
            dtype=str(self.language_model.embed_tokens.weight.dtype).removeprefix("torch."),
        )
        loaded = sum(p.numel() for p in self.parameters()) + self.image_vocab_size * config.hidden_size
        return replace(shape, idle_parameters=loaded - shape.step_parameters)

    @cached_property
    @torch.no_grad()
    def image_embeddings_VE(self) -> Tensor:
        """Table of the input embeddings of the image vocabulary. Computed once: nothing here trains it."""
        return self.embed_image_tokens(torch.arange(self.image_vocab_size, device=self.device)[None])[0]

    def image_logits(self, prompts: PromptBatch, tokens_BT: Tensor, conditional: bool = True) -> Tensor:
        """Return teacher-forced logits, [B, T, V]: those of token t, given the prompt and the tokens before t."""
        text_BPE = prompts.embeds_BPE if conditional else prompts.unconditional_BPE
        embeds_BSE = torch.cat([text_BPE, self.embed_image_tokens(tokens_BT[:, :-1])], dim=1)
        length = embeds_BSE.shape[1]
        padding_B1 = (~prompts.mask_BP).sum(1, keepdim=True)
        positions = torch.arange(length, device=self.device) - padding_B1 + prompts.first_B[:, None]
        hidden_BSE = self.language_model(
            inputs_embeds=embeds_BSE,
            attention_mask=attention_mask(prompts.mask_BP, length),
            position_ids=positions.clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return self.image_head(hidden_BSE[:, text_BPE.shape[1] - 1 :])


def check_prompts(prompts: list[str]) -> None:
    """Raise UserError if a prompt is empty, longer than MAX_PROMPT_CHARS, or not valid Unicode."""
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("empty prompt: give each image a prompt of at least one word")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise UserError(
                f"prompt of {len(prompt)} characters starting {prompt[:40]!r}: the limit is {MAX_PROMPT_CHARS}"
            )
        if any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
            raise UserError(f"prompt {prompt[:40]!r} contains half a surrogate pair, which is no character: remove it")


def roll_rows(x_BP: Tensor, shift_B: Tensor) -> Tensor:
    """Rotate each row of [B, P, ...] to the left by its own number of positions: moves padding to the other side."""
    width = x_BP.shape[1]
    source_BP = (torch.arange(width, device=x_BP.device) + shift_B[:, None]) % width
    return x_BP.gather(1, source_BP.reshape(*source_BP.shape, *[1] * (x_BP.ndim - 2)).expand_as(x_BP))


def attention_mask(mask_BP: Tensor, length: int) -> Tensor | None:
    """Return the causal mask without padding, bool [B, 1, S, S] with S = `length`; None if no prompt is padded.

    A padding position attends only to itself: with nothing to attend to, softmax would make it NaN. No other position
    attends to it.
    """
    if mask_BP.all():
        return None
    keys_BS = torch.nn.functional.pad(mask_BP, (0, length - mask_BP.shape[1]), value=True)
    square = torch.ones(length, length, dtype=torch.bool, device=mask_BP.device)
    eye = torch.eye(length, dtype=torch.bool, device=mask_BP.device)
    return ((square.tril() & keys_BS[:, None]) | eye)[:, None]
