"""Janus and Janus-Pro, from transformers, as an ImageModel.

The shape legend is in base.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.janus.configuration_janus import JanusConfig
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration
from transformers.models.janus.processing_janus import JanusProcessor

from vce_ray.errors import UserError, cut, quote
from vce_ray.models.base import ImageModel, PromptBatch, check_prompts
from vce_ray.models.checkpoint import load_complete, without_dtypes
from vce_ray.models.folder import base_config, folder_revision
from vce_ray.models.pixels import decode_in_batches
from vce_ray.models.prompt_tokens import PromptTokenizer
from vce_ray.models.template import BARE, FILES, DrawingTemplate, drawing_template
from vce_ray.models.words import Vocabulary, normalize

logger = logging.getLogger(__name__)

QUESTION = "Describe this image in one sentence."
MAX_NEW_TOKENS = 128
"""Token limit of a caption: several times the length of a sentence."""


class Janus(ImageModel):
    """Draws and captions images."""

    def __init__(
        self,
        net: JanusForConditionalGeneration,
        processor: Any,
        revision: str,
        vocabulary: Vocabulary | None = None,
        template: DrawingTemplate = BARE,
    ):
        config: Any = net.config
        self.net: Any = net
        self.processor = processor
        self.tokenizer = tokenizer = processor.tokenizer
        self.revision = revision
        self.vocabulary = vocabulary
        self.num_image_tokens = config.vision_config.num_image_tokens
        self.image_vocab_size = config.vq_config.num_embeddings
        self.image_size = config.vision_config.image_size
        processor.num_image_tokens = self.num_image_tokens  # transformers assumes 576 for every checkpoint
        starts = tokenizer.bos_token_id in tokenizer("")["input_ids"]  # else, as in DeepSeek's script, we add BOS
        before = template.before if starts else tokenizer.bos_token + template.before
        self._tokenize_prompts = PromptTokenizer(tokenizer, before, template.after + tokenizer.boi_token)
        self._pad = tokenizer.pad_token_id

    @classmethod
    def from_folder(cls, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Janus:
        """Load a checkpoint folder in transformers' format. Weights are read from safetensors only.

        Raises:
            UserError: a weight is missing or of another shape, config, tokenizer or image processor are damaged, or
                there is no chat template or pad token.
        """
        template = drawing_template(folder)
        if template is None:
            raise UserError(f"{folder} has no chat template ({FILES[0]}): download the checkpoint again")
        try:
            config = JanusConfig.from_dict(without_dtypes(base_config(str(folder))))
            processor: Any = JanusProcessor.from_pretrained(folder, config=config)
        except Exception as error:  # tokenizers raises no more specific type
            raise UserError(
                f"config, tokenizer or image processor of {folder} cannot be loaded ({cut(str(error))}): download the "
                "checkpoint again"
            ) from error
        if processor.tokenizer.pad_token_id is None:  # guidance needs it: see encode_prompts
            raise UserError(f"the tokenizer of {folder} has no pad_token: download the checkpoint again")
        net = load_complete(JanusForConditionalGeneration, folder, dtype, config=config)
        net.model.vqmodel.to(memory_format=torch.channels_last)  # makes convolutions a third faster on CPUs
        return cls(net.to(device).eval(), processor, folder_revision(folder), Vocabulary.of(folder), template)

    def encode_prompts(self, prompts: list[str]) -> PromptBatch:
        """Tokenize and embed prompts for sampling, in the checkpoint's drawing template, padded on the left.

        A row is BOS, the prompt in its template and begin-of-image. Without its text, all tokens but the first and the
        last are pad tokens, which are attended to: those of the template too, as in DeepSeek's sampling script. A
        control token that is typed in a prompt is split into ordinary ones.

        Prompts for a model with a closed vocabulary are normalized first (words.py), those for others only stripped.

        Raises:
            UserError: a prompt is empty, longer than MAX_PROMPT_CHARS, or has more tokens than the model has room for.
        """
        rows = self._tokenize(prompts)
        width = max(map(len, rows))
        ids_BP = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=self.device)
        starts_B1 = torch.tensor([width - len(row) for row in rows], device=self.device)[:, None]
        columns = torch.arange(width, device=self.device)
        between_BP = (columns > starts_B1) & (columns < width - 1)
        embed = self.language_model.embed_tokens
        blank_BP = ids_BP.masked_fill(between_BP, self._pad)
        return PromptBatch(embed(ids_BP), embed(blank_BP), columns >= starts_B1, torch.zeros_like(ids_BP[:, 0]))

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError if a prompt is empty or too long to be drawn, and log a warning about words that the model
        does not know. Uses no device."""
        self._tokenize(prompts)
        if self.vocabulary and (problem := self.vocabulary.problem(prompts)):
            logger.warning("what is drawn may not fit the prompt: %s", problem)

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        check_prompts(prompts)
        texts = [normalize(prompt) if self.vocabulary else prompt.strip() for prompt in prompts]
        if "" in texts:
            raise UserError(f"prompt {quote(prompts[texts.index('')])} has no word: give at least one")
        rows = self._tokenize_prompts(texts)
        limit = self.net.config.text_config.max_position_embeddings - self.num_image_tokens
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > limit:
                raise UserError(
                    f"prompt of {len(row)} tokens starting {prompt[:40]!r}: the limit is {limit}: shorten it"
                )
        return rows

    @property
    def image_head_parts(self) -> list[Any]:
        """The modules of the image head: two linear ones with an activation between them."""
        head = self.image_head
        return [head.proj_out, head.activation_fn, head.vision_head]

    def embed_image_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Return the input embeddings of image tokens: [B, T, E]."""
        return self.net.prepare_embeddings_for_image_generation(tokens_BT)

    @torch.no_grad()
    def decode_pixels(self, tokens_BT: Tensor) -> np.ndarray:
        """Decode image tokens to images, uint8 [B, H, W, 3]."""
        return decode_in_batches(tokens_BT.to(self.device), self.net.model.vqmodel.decode)

    @torch.no_grad()
    def encode_pixels(self, images: np.ndarray) -> Tensor:
        """Encode images, uint8 [B, H, W, 3], as image tokens, int64 [B, T].

        Takes the nearest code by cosine, as the original Janus does (transformers' quantizer does not normalize).
        """
        vq = self.net.model.vqmodel
        pixels = torch.from_numpy(images).to(self.device, vq.quant_conv.weight.dtype).permute(0, 3, 1, 2) / 127.5 - 1
        latents = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2)
        codes = torch.nn.functional.normalize(vq.quantize.embedding.weight, dim=1)
        return (latents @ codes.T).argmax(-1)

    @torch.no_grad()
    def caption(self, images: np.ndarray, question: str = "") -> list[tuple[str, bool]]:
        """Caption images, uint8 [B, H, W, 3], greedily: each answer, and whether it ended before MAX_NEW_TOKENS.

        A model with a closed vocabulary is asked QUESTION, the only one that it knows.
        """
        asked = QUESTION if self.vocabulary else question or QUESTION
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = self.processor(text=[text] * len(images), images=list(images), return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.net.model.aligner.fc1.weight.dtype)
        out = self.net.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = out[:, inputs["input_ids"].shape[1] :]
        ended = (new == self.tokenizer.eos_token_id).any(1).tolist()
        return [
            (line.strip(), end) for line, end in zip(self.tokenizer.batch_decode(new, skip_special_tokens=True), ended)
        ]
