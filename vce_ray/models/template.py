"""The form in which a checkpoint gets its prompts: what stands before and after the text when an image is drawn.

It is read from the checkpoint's chat template, without transformers or torch. DeepSeek draws from a chat of one turn:
Janus-Pro gets '<|User|>: a deer\n\n<|Assistant|>:<begin_of_image>'. The chat template of the embedded model renders
nothing but images, so its prompts stay bare.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vce_ray.errors import UserError, cut

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files that may hold a chat template, in the order of transformers: the first that does counts."""
TEXT = "a deer 0f4d1c7be2"
"""Stands for the prompt when a chat template is rendered. No template contains it."""


@dataclass(frozen=True)
class DrawingTemplate:
    """What is written around a prompt before it is tokenized. The begin-of-image token follows."""

    before: str = ""
    after: str = ""


BARE = DrawingTemplate()
"""The prompt and nothing else."""
CLEANED = {"llamagen": "cleaned captions"}
"""By model type, what is done to a prompt although no file of the checkpoint says so."""


def chat_template(read: Callable[[str], str | None]) -> str | None:
    """Return the chat template of a checkpoint; None if it has none.

    Args:
        read: returns the text of a file of the checkpoint, None if there is no such file.

    Raises:
        UserError: a file that may hold it is not JSON.
    """
    for name in FILES:
        text = read(name)
        if text is None:
            continue
        if name.endswith(".jinja"):
            return text
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON ({error})", "download the checkpoint again") from error
        if isinstance(found, dict) and isinstance(found.get("chat_template"), str):
            return found["chat_template"]
    return None


def drawing_template(folder: Path) -> DrawingTemplate | None:
    """Return the drawing template of a checkpoint folder, by its chat template; None if it has none.

    It is the chat of one turn in which the user says the prompt, up to where the assistant answers. A chat template
    that renders no text gives BARE.

    Raises:
        UserError: the chat template cannot be rendered, or repeats the text.
    """
    template = chat_template(lambda name: _text(folder / name))
    if template is None:
        return None
    turn = {"role": "user", "content": [{"type": "text", "text": TEXT}]}
    rendered = _render(template, [turn], folder)
    match rendered.split(TEXT):
        case [before, after]:
            return DrawingTemplate(before, after)
        case [_]:
            return BARE
    raise UserError(f"the chat template of {folder} repeats the user's text: give a checkpoint of the Janus family")


def prompt_form(folder: Path, model_type: Any) -> str:
    """Return what turns a prompt into tokens besides the tokenizer; "" if it is only stripped.

    It is a part of the revision of a base: in another form, the same prompt gives another image.

    Args:
        folder: the base.
        model_type: of its config.json.

    Raises:
        UserError: as `drawing_template`.
    """
    template = drawing_template(folder)
    return CLEANED.get(str(model_type), "") if template in (None, BARE) else repr(template)


def _text(path: Path) -> str | None:
    return path.read_bytes().decode(errors="replace") if path.exists() else None


def _render(template: str, messages: list[dict[str, Any]], folder: Path) -> str:
    """Render a chat template, which comes with a checkpoint and so is not trusted, as transformers does."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(
            f"the chat template of {folder} cannot be rendered ({cut(str(error))}): download the checkpoint again"
        ) from error
