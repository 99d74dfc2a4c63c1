"""Architecture of the embedded Janus, and its export as a checkpoint that transformers loads unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.models.janus.image_processing_janus import JanusImageProcessor

from tools.emoji_world.scenes import EDGE
from tools.emoji_world.tokenizer import build_tokenizer
from tools.emoji_world.train_vq import CONFIG as VQ
from tools.emoji_world.world import write_words

WIDTH = 256
TOKENS = 64
"""Image tokens per image: 8 x 8."""
CHAT_TEMPLATE = (  # the image alone, without a question: captioning is the model's only task
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>{% endif %}{% endfor %}{% endfor %}"
)


def build_processor() -> JanusProcessor:
    """Return the tokenizer and image processor of the emoji world."""
    images = JanusImageProcessor(
        size={"height": EDGE, "width": EDGE}, min_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(images, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_model(processor: JanusProcessor) -> JanusForConditionalGeneration:
    """Return a miniature Janus with random weights."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token")) for name in ("boi", "image")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=EDGE,
        patch_size=8,
        projection_dim=WIDTH,
        num_image_tokens=TOKENS,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=JanusVQVAEConfig(**VQ),
        image_token_id=ids["image"],
        tie_word_embeddings=True,
    )
    model = JanusForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.generation_kwargs = {"boi_token_id": ids["boi"]}
    return model


def export(model: JanusForConditionalGeneration, processor: JanusProcessor, folder: Path) -> None:
    """Write the checkpoint folder. Weights are stored in float16, half the size, but load as float32 by default."""
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_words(folder)
    weights = folder / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    # transformers ignores generation_kwargs in a generation config that is marked as derived from the model's config
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text())
    generation.pop("_from_model_config", None)
    generation["generation_kwargs"] = model.generation_config.generation_kwargs
    path.write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")
