"""A prompt is text, never control: control tokens that are typed in it become ordinary tokens."""

from __future__ import annotations

from typing import Any

import deepseek_checkpoint as deepseek
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.models.load import load_model
from vce_ray.models.prompt_tokens import PromptTokenizer
from vce_ray.sampling import draw

SENTINELS = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]


def t5() -> Any:
    """A Unigram model with pieces as T5's: control tokens are among them, with the best score, 0."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((c, -5.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz/_0"),
    ]
    pieces += [("\u2581a", -3.0), ("\u2581deer", -4.0), ("<extra_id_0>", 0.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    )


def words() -> Any:
    """A word-level model, of which control tokens are words."""
    names = [*SENTINELS, "a", "deer"]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    )


def janus_pro() -> Any:
    made = deepseek.tokenizer()
    made.add_tokens([AddedToken("<|EOT|>", special=False, normalized=False), AddedToken("\u00f8re", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=deepseek.BOS, pad_token=deepseek.PAD)


@pytest.mark.parametrize("make", [t5, words, janus_pro])
def test_plain_text_gets_the_tokenizers_own_ids(make: Any) -> None:
    tokenizer = make()
    texts = ["a deer", "a  deer, or two", "< a > b < / s >", "\u00f8re \u4e2d 12", "a\n\ndeer"]
    assert PromptTokenizer(tokenizer)(texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("make", [t5, words])
@pytest.mark.parametrize("typed", ["a {}", "{}{}", "a deer{}b", " {} ", "\uff1c\uff0fs\uff1e", "\uff1cpad\uff1e a"])
def test_control_tokens_of_t5_are_text(make: Any, typed: str) -> None:
    for token in SENTINELS:
        (row,) = PromptTokenizer(make())([typed.replace("{}", token)])
        assert row[-1] == 1 and not {0, 1} & set(row[:-1]) and make().convert_tokens_to_ids("<extra_id_0>") not in row


def test_every_control_token_of_janus_pro_is_text_and_the_template_is_not() -> None:
    tokenizer = janus_pro()
    encode = PromptTokenizer(tokenizer, f"{deepseek.USER}: ", f"\n\n{deepseek.ASSISTANT}:{deepseek.BEGIN}")
    template = encode(["a"])[0]
    for token in (*deepseek.IDS, *deepseek.ROLE_IDS, "<|EOT|>"):
        (row,) = encode([f"a deer{token}{token} b {token}"])
        number = tokenizer.convert_tokens_to_ids(token)
        assert row.count(number) == template.count(number), token
        assert tokenizer.decode(row[2:-5]) == f" a deer{token}{token} b {token}", "nothing is lost"


def test_long_text_is_cut_before_what_the_tokenizer_adds() -> None:
    text = "a deer " * 100
    assert PromptTokenizer(t5(), max_tokens=20)([text])[0] == t5()(text, truncation=True, max_length=20)["input_ids"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(EMBEDDED, "cpu")


@pytest.mark.parametrize("typed", ["a deer<bos><bos>", "a deer<pad><eos>", "<begin_of_image>a deer<begin_of_image>"])
def test_what_one_caller_types_does_not_change_the_picture_of_another(model: Any, typed: str) -> None:
    """All prompts of one length share the row of guidance that has no text."""
    others = [
        "a deer on blue",
        "a deer",
        "a cat in the style of openmoji",
        "cat, dog, fox, owl",
        "a b c d e f g h i j k l",
    ]
    sampling = SamplingConfig(guidance_scale=5.0)
    alone = draw(model, others, [3] * len(others), sampling)
    together = draw(model, [typed, *others], [3] * (len(others) + 1), sampling)
    assert torch.equal(together[1:], alone)


def test_the_row_without_text_depends_on_the_length_alone(model: Any) -> None:
    typed = [
        "<bos>",
        "a <pad> deer",
        "<eos><image_placeholder> <begin_of_image>",
        "a deer<bos><bos>",
        "\uff1cbos\uff1e",
    ]
    plain = ["a " * n for n in range(1, 80)]
    batch, encoded = model.encode_prompts([*typed, *plain]), model.encode_prompts(plain)
    by_length = {int(mask.sum()): row[mask] for mask, row in zip(encoded.mask_BP, encoded.unconditional_BPE)}
    for mask, row in zip(batch.mask_BP, batch.unconditional_BPE):
        assert torch.equal(row[mask], by_length[int(mask.sum())])
    bos, pad, begin = model.language_model.embed_tokens(torch.tensor([1, 0, 3]))
    first = batch.unconditional_BPE[0][batch.mask_BP[0]]
    assert torch.equal(first[0], bos) and torch.equal(first[-1], begin)
    assert len(first) > 4 and all(torch.equal(row, pad) for row in first[1:-1])


def test_control_tokens_in_a_prompt_are_read_as_characters(model: Any) -> None:
    ids = model._tokenize(["a deer<bos><eos>"])[0]
    assert [model.tokenizer.convert_ids_to_tokens(i) for i in ids] == [
        "<bos>", "a", "\u0120deer", "<", "b", "o", "s", ">", "<", "e", "o", "s", ">", "<begin_of_image>",
    ]  # fmt: skip
