"""Asks vision and language models, and cleans up their answers: one sentence per image, or the reason for a reject.

A refusal and an empty, truncated or overlong answer become a Caption with an error. An answer of several sentences is
cut to the first one.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

from vce_ray.concepts.wording import ABBREVIATIONS, straight_quotes

QUESTION = (
    "Describe what is visible in this image in one plain sentence: its objects, their colours, the background and the "
    "style in which it is made. Answer with that sentence only."
)
"""Prompt for endpoints and vLLM. It does not name the concept, so that it cannot bias the answer."""
ANSWER_TOKENS = 128
"""Token limit of an answer: several times the length of the sentence asked for."""
MAX_CAPTION_LENGTH = 400
"""Characters of the longest accepted caption: the image models do not read prompts longer than that."""


@dataclass(frozen=True)
class Caption:
    """A captioner's or refiner's answer about one image or caption, cleaned up."""

    text: str
    """One sentence; '' if there is an error."""
    answer: str
    """The complete answer, in one line."""
    error: str = ""
    """Why the answer is unusable: the reason of a reject."""


_THOUGHT = re.compile(r"^.*?</think>|^\s*<think>.*", re.DOTALL)
"""Chain of thought, closed or cut off by the token limit."""
_PARAGRAPH_END = re.compile(r"\n\s*\n|\n\s*(?:[-*#\u2022]|\d+[.)])\s")
"""A blank line, or the start of a list item or heading."""
_OPENING = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely)(?: thing)?[.!,:]\s+)?"
    r"(?:here(?:'s| is| it is| you go)\b[^:.]{0,80}:\s*)?"
    r"(?:(?:caption|description|answer)\s*:\s*)?",
    re.IGNORECASE,
)
_SENTENCE_GAP = re.compile(
    rf"(?<=[^\W_]{{2}}[.!?]){ABBREVIATIONS}\s+(?=[\"'(]?[A-Z])|(?<=[.!?][\")])\s+(?=[\"'(]?[A-Z])"
)
_REFUSAL = re.compile(
    r"^(?:(?:i'?m|i am|we'?re|we are) )?(?:(?:very|so|really) )?(?:sorry|afraid)"
    r"(?=[,.!;:]| (?:but|i|we|that|this|for)\b|$)"
    r"|^(?:unfortunately|my apologies|i (?:must )?apologi[sz]e|as an ai|i must decline|i(?:'d| would) rather not)\b"
    r"|\b(?:i|we)(?: (?:cannot|can't|can not|won't|will not|could not|couldn't|do not|don't)|(?:'m| am|'re| are)"
    r" (?:unable|not able|not comfortable|not allowed|not permitted))\b"
    r"|\b(?:against|violates?|violating) (?:my|our|the|your)? ?(?:[\w-]+ ){0,2}(?:polic(?:y|ies)|guidelines|terms)\b",
    re.IGNORECASE,
)


def caption_question(image: bytes) -> list[dict[str, Any]]:
    """Return the content of a chat message that asks for a caption of an image, PNG bytes."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]


def clean(answer: str, cut_off: bool = False, refused: bool = False, role: str = "captioner") -> Caption:
    """Return the first sentence of an answer, or the reason why the answer is unusable.

    Polite openings ("Sure! Here is ..."), quotation marks around the whole answer, Markdown bold, and chains of thought
    in <think> tags are removed.

    Args:
        cut_off: the answer reached its token limit.
        refused: the server marked the answer as a refusal.
        role: 'captioner' or 'refiner', for the error.
    """
    plain = _THOUGHT.sub("", straight_quotes(answer)).replace("**", "").strip()
    whole = " ".join(plain.split())
    first = " ".join(_PARAGRAPH_END.split(plain)[0].split())
    first = first[_opening_length(first) :]
    if len(first) > 1 and first[0] == first[-1] and first[0] in "\"'`" and first.count(first[0]) == 2:
        first = first[1:-1].strip()
    sentences = _SENTENCE_GAP.split(first)
    text = sentences[0].strip()
    complete = len(sentences) > 1 or text.endswith((".", "!", "?"))
    if refused or _REFUSAL.search(text):
        error = f"{role} refused"
    elif cut_off and not complete:
        error = "caption cut off"
    elif not text:
        error = "empty caption"
    elif len(text) > MAX_CAPTION_LENGTH:
        error = "caption too long"
    else:
        return Caption(text, whole)
    return Caption("", whole or answer.strip(), error)


def _opening_length(text: str) -> int:
    """Return the number of characters of a polite opening or a label such as 'Caption:'."""
    match = _OPENING.match(text)
    return match.end() if match else 0
