"""Each checkpoint's own drawing template: DeepSeek's for released Janus, bare text for the embedded model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepseek_checkpoint as deepseek
import pytest
import torch
from transformers import JanusProcessor

from vce_ray.config import EMBEDDED
from vce_ray.errors import UserError
from vce_ray.models import multi_modality
from vce_ray.models.adapter import save_adapter
from vce_ray.models.adapter_location import check_adapter
from vce_ray.models.folder import base_stamp, check_stamp, folder_revision, model_folder
from vce_ray.models.load import load_model
from vce_ray.models.template import BARE, DrawingTemplate, drawing_template
from vce_ray.training.reference import reference_log_probs

PROMPTS = [
    "a deer",
    " A deer, by night!\n",
    "two foxes\n\nand an owl",
    "7 \u4e2d\u6587 caf\u00e9s: \u201cOPEN\u201d",
    "{{ x }} {% if %}",
]
JANUS_PRO = DrawingTemplate("<|User|>: ", "\n\n<|Assistant|>:")
OTHER_WORDING = (
    "{% set seps = ['\\n\\n', '" + deepseek.EOS + "'] %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'].strip() }}"
    "{% else %}<image_placeholder>{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}{{ seps[loop.index0 % 2] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
"""A chat template that writes the same in another way."""


@pytest.fixture(scope="module")
def janus_pro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small Janus-Pro with random weights, in the format of transformers."""
    place = tmp_path_factory.mktemp("janus-pro")
    with pytest.MonkeyPatch.context() as patch:
        deepseek.register(patch)
        multi_modality.convert(str(deepseek.write(place / "source", "safetensors")), place / "janus")
    yield place / "janus"


@pytest.fixture(scope="module")
def model(janus_pro: Path) -> Any:
    return load_model(str(janus_pro), "cpu")


def row(model: Any, prompt: str, conditional: bool = True) -> list[int]:
    """The token ids that a prompt's embeddings are those of."""
    batch = model.encode_prompts([prompt])
    embeds = batch.embeds_BPE if conditional else batch.unconditional_BPE
    table = model.language_model.embed_tokens.weight
    found = torch.cdist(embeds[0].double(), table.double()).argmin(1)
    assert torch.equal(table[found], embeds[0])
    return found.tolist()


def test_the_tokens_are_those_that_deepseeks_script_sends(model: Any) -> None:
    """generation_inference.py of github.com/deepseek-ai/Janus: one turn of the user, an empty one of the assistant and
    no system prompt in the template 'deepseek' (conversation.py), then the begin-of-image tag."""
    ids = row(model, "a deer")
    assert model.tokenizer.convert_ids_to_tokens(ids) == [
        deepseek.BOS, "<|User|>", ":", "\u0120a", "\u0120deer", "\u010a", "\u010a", "<|Assistant|>", ":",
        "<begin_of_image>",
    ]  # fmt: skip
    user, assistant = deepseek.ROLE_IDS.values()
    words = [model.tokenizer.convert_tokens_to_ids(word) for word in (":", "\u0120a", "\u0120deer", "\u010a")]
    assert ids == [100000, user, words[0], words[1], words[2], words[3], words[3], assistant, words[0], 100016]
    assert row(model, "a deer", conditional=False) == [100000, *[100002] * 8, 100016]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_they_are_those_of_transformers_processor(model: Any, janus_pro: Path, prompt: str) -> None:
    processor: Any = JanusProcessor.from_pretrained(janus_pro)
    chat = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    theirs = processor(text=[text], generation_mode="image", return_tensors="pt")["input_ids"][0].tolist()
    assert row(model, prompt) == theirs
    said = f"<|User|>: {prompt.strip()}\n\n<|Assistant|>:<begin_of_image>"
    assert theirs == [deepseek.IDS[deepseek.BOS], *deepseek.tokenizer().encode(said).ids]


def test_the_template_counts_towards_the_limit(model: Any) -> None:
    limit = 16_384 - deepseek.TOKENS
    model.net.config.text_config.max_position_embeddings = 30 + deepseek.TOKENS
    try:
        model.check_prompts(["a " * 22])
        with pytest.raises(UserError, match=r"prompt of 31 tokens starting 'a a .*: the limit is 30: shorten it"):
            model.check_prompts(["a " * 23])
    finally:
        model.net.config.text_config.max_position_embeddings = limit + deepseek.TOKENS


def test_the_embedded_model_gets_bare_text_and_keeps_its_revision() -> None:
    folder = model_folder(EMBEDDED)
    assert drawing_template(folder) == BARE
    assert folder_revision(folder) == "4edb3facdef24674", "adapters made before there were templates remain valid"


@pytest.fixture
def copy(janus_pro: Path, tmp_path: Path) -> Path:
    return shutil.copytree(janus_pro, tmp_path / "copy")


def test_a_template_is_found_wherever_transformers_keeps_it(copy: Path) -> None:
    assert drawing_template(copy) == JANUS_PRO
    (copy / "chat_template.jinja").write_text(OTHER_WORDING)
    assert drawing_template(copy) == JANUS_PRO
    (copy / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        (copy / name).write_text(
            json.dumps(content | {"chat_template": f"{name}{{{{ messages[0].content[0].text }}}}"})
        )
        assert drawing_template(copy) == DrawingTemplate(name, "")


def test_the_template_is_part_of_the_revision(copy: Path, tmp_path: Path) -> None:
    before, model = base_stamp(str(copy)), load_model(str(copy), "cpu")
    save_adapter(tmp_path / "adapter", {}, model, {"rank": 1, "alpha": 1}, {})
    check_adapter(str(copy), str(tmp_path / "adapter"))
    tokens = torch.zeros(1, deepseek.TOKENS, dtype=torch.int64)
    log_probs, _ = reference_log_probs(model, ["a deer"], False, tokens, tokens)
    (copy / "chat_template.jinja").write_text(OTHER_WORDING)
    assert base_stamp(str(copy)) == before, "what is sent is the same"
    (copy / "chat_template.jinja").write_text(OTHER_WORDING.replace("<|User|>: ", "User: "))
    changed = base_stamp(str(copy))
    with pytest.raises(UserError, match="reference log-probs were computed with base_revision"):
        check_stamp(before, changed)
    with pytest.raises(UserError, match="was trained on base revision"):
        check_adapter(str(copy), str(tmp_path / "adapter"))
    again = load_model(str(copy), "cpu")
    assert again.revision == changed["base_revision"] != model.revision
    assert not torch.allclose(reference_log_probs(again, ["a deer"], False, tokens, tokens)[0], log_probs)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content[0].text * 2 }}", "repeats the user's text"),
        ("{% if %}", "cannot be rendered"),
        ("{{ messages[0].content + 'x' }}", "cannot be rendered"),
        ("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", "cannot be rendered"),
        (None, r"has no chat template \(chat_template\.jinja\)"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(copy: Path, template: str | None, message: str) -> None:
    (copy / "chat_template.jinja").write_text(template or "")
    if template is None:
        (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=message):
        load_model(str(copy), "cpu")


def test_bos_and_pad_are_there_or_the_checkpoint_is_refused(copy: Path, model: Any) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
    assert row(load_model(str(copy), "cpu"), "a deer") == row(model, "a deer"), "its file alone adds no BOS"
    (copy / "tokenizer_config.json").write_text(json.dumps({key: x for key, x in config.items() if key != "pad_token"}))
    with pytest.raises(UserError, match="has no pad_token"):
        load_model(str(copy), "cpu")
