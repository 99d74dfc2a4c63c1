"""Asks vision and language models, and cleans up their answers: a caption per image, or the reason for a reject.

A refusal and an empty, truncated or overlong answer become a Caption with an error. Of an answer of several sentences
the caption is the first paragraph, as far as its complete sentences fit into MAX_CAPTION_LENGTH. Whether the answer
mentions a concept is judged by all of it.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

from vce_ray.concepts.wording import sentences, straight_quotes

QUESTION = (
    "Describe what is visible in this image in one plain sentence: its objects, their colours, the background and the "
    "style in which it is made. Answer with that sentence only."
)
"""What captioners are asked about an image. It does not name the concept, so that it cannot bias the answer."""
STYLE_QUESTION = (
    "Describe this image in one plain sentence: what is visible in it, its colours and background, and above all the "
    "style or art movement in which it is made and the artist whose work it recalls, if any. Answer with that sentence "
    "only."
)
"""What they are asked if a style is erased. An answer to QUESTION often says 'painting' and no more."""
ANSWER_TOKENS = 128
"""Token limit of an answer: several times the length of the sentence asked for."""
MAX_CAPTION_LENGTH = 400
"""Characters of the longest accepted caption: the image models do not read prompts longer than that."""


@dataclass(frozen=True)
class Caption:
    """A captioner's or refiner's answer about one image or caption, cleaned up."""

    text: str
    """Complete sentences, in one line; '' if there is an error."""
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
_REFUSAL = re.compile(
    r"^(?:(?:i'?m|i am|we'?re|we are) )?(?:(?:very|so|really) )?(?:sorry|afraid)"
    r"(?=[,.!;:]| (?:but|i|we|that|this|for)\b|$)"
    r"|^(?:unfortunately|my apologies|i (?:must )?apologi[sz]e|as an ai|i must decline|i(?:'d| would) rather not)\b"
    r"|\b(?:i|we)(?: (?:cannot|can't|can not|won't|will not|could not|couldn't|do not|don't)|(?:'m| am|'re| are)"
    r" (?:unable|not able|not comfortable|not allowed|not permitted))\b"
    r"|\b(?:against|violates?|violating) (?:my|our|the|your)? ?(?:[\w-]+ ){0,2}(?:polic(?:y|ies)|guidelines|terms)\b",
    re.IGNORECASE,
)


def question_for(kind: str) -> str:
    """Return what captioners are asked about the images of a concept of this kind."""
    return STYLE_QUESTION if kind == "style" else QUESTION


def caption_question(image: bytes, question: str = QUESTION) -> list[dict[str, Any]]:
    """Return the content of a chat message that asks a question about an image, PNG bytes."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]


def clean(answer: str, cut_off: bool = False, refused: bool = False, role: str = "captioner") -> Caption:
    """Return the caption in an answer, or the reason why the answer is unusable.

    Polite openings ("Sure! Here is ..."), quotation marks around the whole answer, Markdown bold, and chains of thought
    in <think> tags are removed. So are, after the first sentence, those in which the model speaks of itself, and one
    that is cut off.

    Args:
        cut_off: the answer reached its token limit.
        refused: the server marked the answer as a refusal.
        role: 'captioner' or 'refiner', for the error.
    """
    plain = _THOUGHT.sub("", straight_quotes(answer)).replace("**", "").strip()
    whole = " ".join(plain.split())
    paragraphs = _PARAGRAPH_END.split(plain)
    first = " ".join(paragraphs[0].split())
    first = first[_opening_length(first) :]
    if len(first) > 1 and first[0] == first[-1] and first[0] in "\"'`" and first.count(first[0]) == 2:
        first = first[1:-1].strip()
    found = sentences(first)
    text = found[0].strip()
    whole_first = len(found) > 1 or text.endswith((".", "!", "?"))
    if refused or _REFUSAL.search(text):
        error = f"{role} refused"
    elif cut_off and not whole_first:
        error = "caption cut off"
    elif not text:
        error = "empty caption"
    elif len(text) > MAX_CAPTION_LENGTH:
        error = "caption too long"
    else:
        ends_early = cut_off and len(paragraphs) == 1
        return Caption(_fitting([text, *found[1:]], ends_early), whole)
    return Caption("", whole or answer.strip(), error)


def _fitting(found: list[str], cut_off: bool) -> str:
    """Join the first sentence and those after it that are complete, until MAX_CAPTION_LENGTH is reached."""
    text = found[0]
    for sentence in found[1:]:
        if _REFUSAL.search(sentence) or (cut_off and not sentence.endswith((".", "!", "?"))):
            continue
        if len(text) + 1 + len(sentence) > MAX_CAPTION_LENGTH:
            break
        text = f"{text} {sentence}"
    return text


def _opening_length(text: str) -> int:
    """Return the number of characters of a polite opening or a label such as 'Caption:'."""
    match = _OPENING.match(text)
    return match.end() if match else 0
