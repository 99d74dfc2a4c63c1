"""Tokenizer, image processor and chat template of a Janus in DeepSeek's own format, as transformers' JanusProcessor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.janus.image_processing_janus import JanusImageProcessor
from transformers.models.janus.processing_janus import JanusProcessor

from vce_ray.errors import UserError, cut, quote

ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}
"""What user and assistant are called, by the `sft_format` of processor_config.json: Janus-Pro has the first."""
TAGS = {
    "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
    "pad_tag": "<\uff5c\u2581pad\u2581\uff5c>",
}
"""The tokens that DeepSeek's processor takes where processor_config.json names no others."""
IMAGE_SETTINGS = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")


def make_processor(folder: Path) -> Any:
    """Return the processor of a checkpoint folder.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer lacks a token that the model needs.
    """
    named = _read(folder / "processor_config.json")
    images = _read(folder / "preprocessor_config.json")
    sft_format = named.get("sft_format", "deepseek")
    if sft_format not in ROLES:
        raise UserError(f"{folder} has sft_format {quote(sft_format)}: known are {', '.join(ROLES)}")
    tokenizer = _tokenizer(folder, TAGS | {key: named[key] for key in TAGS if key in named})
    roles = ROLES[sft_format]
    if roles[0].startswith("<"):
        _check_tokens(tokenizer, roles, folder)
    size = images.get("image_size")
    if not isinstance(size, int):
        raise UserError(f"preprocessor_config.json of {folder} has no image_size: download the checkpoint again")
    settings = {key: images[key] for key in IMAGE_SETTINGS if key in images}
    return JanusProcessor(
        JanusImageProcessor(size={"height": size, "width": size}, **settings),
        tokenizer,
        chat_template=chat_template(*roles, tokenizer),
        use_default_system_prompt=True,  # as DeepSeek does where an image is described
    )


def chat_template(user: str, assistant: str, tokenizer: Any) -> str:
    """Return the chat template of DeepSeek's models: turns of a role, a colon and what is said.

    Args:
        tokenizer: has the tokens that stand for an image and that end what the assistant says.
    """
    return (
        "{% for message in messages %}"
        "{% set of_user = message['role']|lower == 'user' %}"
        f"{{{{ {user!r} if of_user else {assistant!r} }}}}: "
        "{% for part in message['content'] %}"
        "{% if not loop.first %}{{ '\\n' }}{% endif %}"
        f"{{{{ {tokenizer.image_token!r} if part['type'] == 'image' else part['text']|trim }}}}"
        "{% endfor %}"
        f"{{{{ '\\n\\n' if of_user else {tokenizer.eos_token!r} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{assistant}:{{% endif %}}"
    )


def _tokenizer(folder: Path, tags: dict[str, str]) -> Any:
    settings = _read(folder / "tokenizer_config.json")
    special: dict[str, Any] = {"pad_token": tags["pad_tag"]}
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        special[key] = token["content"] if isinstance(token, dict) else token
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no more specific type
        raise UserError(f"tokenizer.json of {folder} cannot be read ({cut(str(error))}): download it again") from error
    tokens = {
        "image_token": tags["image_tag"],
        "boi_token": tags["image_start_tag"],
        "eoi_token": tags["image_end_tag"],
    }
    missing = [
        f"{key} {quote(token)}"
        for key, token in (special | tokens).items()
        if not token or backend.token_to_id(token) is None
    ]
    if missing:
        raise UserError(f"the tokenizer of {folder} does not know {', '.join(missing)}: download the checkpoint again")
    if settings.get("add_bos_token", True):  # by itself, the class that DeepSeek's script loads adds it
        start = [(special["bos_token"], backend.token_to_id(special["bos_token"]))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special['bos_token']} $A", special_tokens=start
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        padding_side="left",
        model_max_length=settings.get("model_max_length", 16_384),
        extra_special_tokens=tokens,
    )


def _check_tokens(tokenizer: Any, roles: tuple[str, str], folder: Path) -> None:
    known = tokenizer.get_vocab()
    if missing := [role for role in roles if role not in known]:
        raise UserError(f"the tokenizer of {folder} has no token {missing[0]}, which its sft_format needs")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({cut(str(error))}): download the checkpoint again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings but {quote(found)}: download the checkpoint again")
    return found
