"""The text tokenizer of the emoji world: a small byte-level BPE, so that it can encode any prompt."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tools.emoji_world.world import THINGS, random_prompt, random_scene

SPECIAL = ("<pad>", "<bos>", "<eos>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
VOCABULARY = 800


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learn the merges from the world's own sentences. Adds BOS, which Janus' processor leaves to the tokenizer."""
    rng = random.Random(0)
    corpus = [random_prompt(rng, random_scene(rng)) for _ in range(20_000)]
    corpus += [f"{word}, a {word}" for thing in THINGS for word in (thing.name, *thing.synonyms)] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_placeholder>",
        },
    )
