"""Tokenize what users write. A prompt is text: a control token that is typed in it is split into ordinary tokens."""

from __future__ import annotations

import json
import re
from secrets import token_hex
from typing import Any

from tokenizers import Tokenizer

TAG = re.compile(r"<.+>", re.DOTALL)
"""Added tokens that are written like this control the model, whether or not they are marked as special."""


class PromptTokenizer:
    """A tokenizer of transformers with text around each prompt. Control tokens are recognized in that text alone.

    In a copy of the tokenizer, every control token has a random name that nobody can type, and the text around the
    prompts is written with these names. Prompts without control tokens get the ids that the tokenizer itself gives
    them. (`encode_special_tokens` of tokenizers is not enough: a Unigram or word model still knows '</s>' as a word.)
    """

    def __init__(self, tokenizer: Any, before: str = "", after: str = "", max_tokens: int | None = None):
        """Copy a tokenizer.

        Args:
            before: text in front of each prompt.
            after: text behind it.
            max_tokens: tokens of a row, with those that the tokenizer adds, above which the end of the text is cut off.
        """
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        names = {
            token["content"]: f"<{token_hex(16)}>"
            for token in state["added_tokens"]
            if token["special"] or TAG.fullmatch(token["content"])
        }
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename(state["model"], names)
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if max_tokens is not None:
            self._tokenizer.enable_truncation(max_tokens)
        self._before, self._after = _renamed(before, names), _renamed(after, names)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each prompt, with the text around it and what the tokenizer adds."""
        rows = self._tokenizer.encode_batch([self._before + text + self._after for text in texts])
        return [row.ids for row in rows]


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename words of the model of a tokenizer, in the form in which tokenizers saves it. Ids stay."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(word, word): number for word, number in vocabulary.items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
    else:  # Unigram: words with their scores, by id
        model["vocab"] = [[names.get(word, word), score] for word, score in vocabulary]


def _renamed(text: str, names: dict[str, str]) -> str:
    """Write a text with the new names of the tokens in it."""
    known = sorted(names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, known)), lambda found: names[found[0]], text) if known else text
