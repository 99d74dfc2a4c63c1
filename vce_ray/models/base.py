"""What the rest of the code needs from a base model, and no more.

Shape legend of the model code: B images or prompts, P prompt length, T image tokens, S = P + T - 1 positions,
V image vocabulary, E width of the language model, H W picture height and width.
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
from vce_ray.sampling.decoder import Decoder
from vce_ray.sampling.plan import Shape

MAX_PROMPT_CHARS = 2000
"""Prompts are untrusted: a longer one is refused before it costs memory."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the language model reads them, padded on the left, and the same rows with their text blanked out."""

    embeds_BPE: Tensor
    unconditional_BPE: Tensor
    """Has the lengths of the prompts, and depends on nothing but them."""
    mask_BP: Tensor
    """bool: True where there is no padding."""
    first_B: Tensor
    """int64: the position at which the first token of a prompt stands, for the rotary embedding."""

    def __len__(self) -> int:
        return len(self.mask_BP)

    def rows(self, chosen: Tensor) -> PromptBatch:
        """The prompts at these places, in this order."""
        return PromptBatch(
            self.embeds_BPE[chosen], self.unconditional_BPE[chosen], self.mask_BP[chosen], self.first_B[chosen]
        )

    def blanked(self, blank: list[bool]) -> PromptBatch:
        """The same prompts, some of them without their text."""
        blank_B11 = torch.tensor(blank, device=self.mask_BP.device)[:, None, None]
        embeds = torch.where(blank_B11, self.unconditional_BPE, self.embeds_BPE)
        return PromptBatch(embeds, self.unconditional_BPE, self.mask_BP, self.first_B)


class ImageModel(ABC):
    """An autoregressive text-to-image model: a Llama over image tokens behind a prompt, and an image tokenizer.

    What its subclasses set and define is where Janus and LlamaGen differ.
    """

    net: Any
    """What is trained and what adapters are put on: a torch module with `model.language_model` and
    `model.generation_head`, whose layers no type declares."""
    revision: str
    """Names weights and tokenizer: the same revision draws the same image from the same seed."""
    num_image_tokens: int
    image_vocab_size: int
    image_size: int
    """Edge of a picture in pixels."""
    prompt_tokens = 40
    """Of a longer prompt than most: what memory is planned for."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> PromptBatch:
        """Reads prompts for drawing. Raises UserError on an empty or overlong prompt."""

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError where a prompt is empty or too long to be drawn; touches no device."""
        check_prompts(prompts)

    @abstractmethod
    def embed_image_tokens(self, tokens_BT: Tensor) -> Tensor:
        """What the language model reads for image tokens: [B, T, E]."""

    @abstractmethod
    def decode_pixels(self, tokens_BT: Tensor) -> np.ndarray:
        """Pictures, uint8 [B, H, W, 3]."""

    @abstractmethod
    def encode_pixels(self, images: np.ndarray) -> Tensor:
        """Image tokens tokens_BT of uint8 [B, H, W, 3]."""

    @abstractmethod
    def caption(self, images: np.ndarray) -> list[str]:
        """One sentence for each picture of uint8 [B, H, W, 3]. Raises UserError where the model cannot read images."""

    @property
    def language_model(self) -> Any:
        """The Llama, also where peft has wrapped its layers."""
        return self.net.model.language_model

    @property
    def image_head(self) -> Any:
        """From hidden states [..., E] to logits of the next image token [..., V]."""
        return self.net.model.generation_head

    @property
    def image_head_parts(self) -> list[Any]:
        """The modules that the image head applies, one after the other."""
        return [self.image_head]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.language_model.embed_tokens.weight.device

    def parameters(self) -> Iterator[Tensor]:
        """All weights that are loaded."""
        return self.net.parameters()

    @cached_property
    def shape(self) -> Shape:
        """What drawing costs depend on, its parameters counted."""
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
    def decoder(self) -> Decoder:
        """The language model, ready to draw; made once, so that its cache is kept between batches."""
        return Decoder(self.language_model, self.image_head_parts)

    @cached_property
    @torch.no_grad()
    def image_embeddings_VE(self) -> Tensor:
        """What the language model reads for each entry of the image vocabulary; nothing here trains it."""
        return self.embed_image_tokens(torch.arange(self.image_vocab_size, device=self.device)[None])[0]

    def image_logits(self, prompts: PromptBatch, tokens_BT: Tensor, conditional: bool = True) -> Tensor:
        """Teacher-forced logits_BTV: row t is the distribution of token t given the prompt and tokens before t."""
        text_BPE = prompts.embeds_BPE if conditional else prompts.unconditional_BPE
        embeds_BSE = torch.cat([text_BPE, self.embed_image_tokens(tokens_BT[:, :-1])], dim=1)
        length = embeds_BSE.shape[1]
        padding_B1 = (~prompts.mask_BP).sum(1, keepdim=True)
        places = torch.arange(length, device=self.device) - padding_B1 + prompts.first_B[:, None]
        hidden_BSE = self.language_model(
            inputs_embeds=embeds_BSE,
            attention_mask=attention_mask(prompts.mask_BP, length),
            position_ids=places.clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return self.image_head(hidden_BSE[:, text_BPE.shape[1] - 1 :])


def check_prompts(prompts: list[str]) -> None:
    """Raises UserError where a prompt is empty or longer than MAX_PROMPT_CHARS."""
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("empty prompt: give each image a prompt of at least one word")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise UserError(
                f"prompt of {len(prompt)} characters starting {prompt[:40]!r}: the limit is {MAX_PROMPT_CHARS}"
            )


def attention_mask(mask_BP: Tensor, length: int) -> Tensor | None:
    """Who sees whom, bool [B, 1, S, S] of S = `length`: what came before, but no padding. None where none is padded.

    A padding slot sees itself alone; nothing sees it, so its state only has to be finite.
    """
    if mask_BP.all():
        return None
    keys_BS = torch.nn.functional.pad(mask_BP, (0, length - mask_BP.shape[1]), value=True)
    square = torch.ones(length, length, dtype=torch.bool, device=mask_BP.device)
    eye = torch.eye(length, dtype=torch.bool, device=mask_BP.device)
    return ((square.tril() & keys_BS[:, None]) | eye)[:, None]
