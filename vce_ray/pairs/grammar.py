"""Checks that a text is grammatical enough to be a prompt.

The checks look for what is left behind when words are dropped: a determiner without its noun, a preposition or verb
without its object, a clause without its verb. They are few and strict about each, so that they do not refuse ordinary
captions, which are often noun phrases or lists of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vce_ray.concepts.language import can_be_verb, parse
from vce_ray.concepts.wording import word_set

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token

NO_CONTENT = word_set(
    """a an the this that these those it its it's he his she her they them their there here some one ones who which is
    are was were be been being has have had and or but of in on at by with without from as to for like into near
    while image picture photo photograph painting paintings drawing illustration artwork art work style manner scene
    depiction rendering emoji draw draws drawn show shows showing depict depicts depicting feature features
    featuring portrays made done painted very highly detailed both also still completely view kind way"""
)
"""Words that give an image model nothing to draw."""
_NEEDS_NOUN = word_set("""of with at for from into to without beside against between toward towards during via""")
"""Prepositions that do not stand alone as adverbs, as 'above' does."""
_NEEDS_OBJECT = word_set(
    """hold wield wear depict show feature contain carry portray cover include clutch have display resemble evoke
    recall surround use capture"""
)
_ARTICLES = word_set("a an the his her its their my your our this these those every each")
_ENDS = ".!?"
_WORD = re.compile(r"[^\W\d_][\w'-]*")


def fault(text: str) -> str:
    """Return in a few words what is wrong with a text; '' if it may be a prompt."""
    return next(_faults(parse(text)), "")


def has_content(text: str) -> bool:
    """Return whether a text has a word that an image model could draw. Does not parse it."""
    return bool(content_words(text))


def content_words(text: str) -> set[str]:
    """Return the words of a text, in lower case, that an image model could draw. Does not parse it."""
    return set(_WORD.findall(text.lower())) - NO_CONTENT


def _faults(doc: Doc) -> Iterator[str]:
    words = [token for token in doc if not token.is_space]
    if not any(token.pos_ in ("NOUN", "PROPN", "PRON", "NUM", "X") for token in words):
        if len(words) > 1:
            yield "no noun"
        return
    for mark in ('"', "(", "["):
        closing = {"(": ")", "[": "]"}.get(mark, "")
        if doc.text.count(mark) != doc.text.count(closing) if closing else doc.text.count(mark) % 2:
            yield f"unpaired {mark}"
    for index, token in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else None
        yield from _token_faults(token, following)
    if words[0].lower_ in ("of", "by", "and", "or", "but", "is", "are", "which", ",", "'s"):
        yield f"begins with '{words[0].text}'"


def _token_faults(token: Token, following: Token | None) -> Iterator[str]:
    """Yield what is wrong with a token and the one after it."""
    ends = following is None or following.text in (*_ENDS, ",", ";", ":", ")")
    word = token.lower_
    if word in _ARTICLES and token.tag_ not in ("PRP", "NN", "NNP"):
        closed = ends or (
            following is not None
            and (following.pos_ in ("CCONJ", "DET") or following.tag_ in ("IN", "VBZ", "VBP", "MD", "TO"))
            and following.lower_ not in ("like", "half", "many", "what", "all", "both")
        )
        if word in ("a", "an") and following is not None and following.tag_ == "NNS" and can_be_verb(following.lower_):
            beyond = token.doc[following.i + 1].pos_ if following.i + 1 < len(token.doc) else "PUNCT"
            closed = beyond in ("ADP", "DET", "PUNCT", "ADV", "SCONJ")  # 'with a stands near'
        if closed and word not in ("her", "his", "this", "these", "those", "each"):
            yield f"'{token.text}' without a noun"
        if word in ("a", "an") and token.head.tag_ == "NNS" and token.head.i > token.i:
            between = token.doc[token.i + 1 : token.head.i]
            if not _unsure(token.head) and all(
                t.pos_ in ("ADJ", "NOUN") and t.lower_ not in ("few", "dozen", "couple", "pair") for t in between
            ):
                yield f"'{token.text}' before a plural"
    if word in _NEEDS_NOUN and token.pos_ in ("ADP", "SCONJ", "PART") and token.dep_ not in ("prt",):
        stranded = any(t.dep_ == "relcl" for t in token.ancestors)
        if (ends and not stranded) or (following is not None and following.tag_ in ("VBZ", "MD", "CC", "VBP")):
            yield f"'{token.text}' without an object"
    if token.pos_ == "CCONJ" and (ends or (following is not None and following.pos_ == "CCONJ")):
        yield f"'{token.text}' joins nothing"
    if token.lemma_ in _NEEDS_OBJECT and token.pos_ == "VERB" and token.tag_ in ("VBZ", "VBP", "VBG", "VB"):
        passive = any(t.dep_ == "auxpass" for t in token.children)
        gap = token.dep_ == "relcl" and any(t.dep_ == "nsubj" for t in token.children)
        if not passive and not gap and (ends or (following is not None and following.pos_ in ("CCONJ", "AUX"))):
            yield f"'{token.text}' without an object"
    if token.lemma_ == "be" and token.pos_ in ("AUX", "VERB") and token.tag_ in ("VBZ", "VBP", "VBD"):
        if ends or (following is not None and following.tag_ in ("VBZ", "CC")):
            yield f"'{token.text}' without a complement"
        if following is not None and following.tag_ in ("VB", "VBP", "VBZ") and following.pos_ == "VERB":
            yield f"'{token.text} {following.text}'"
    if token.tag_ in ("WDT", "WP") and not any(
        t.pos_ in ("VERB", "AUX") or _unsure(t) for t in token.doc[token.i + 1 : token.sent.end]
    ):
        yield f"'{token.text}' without a verb"
    if following is not None and word == following.lower_ and token.is_alpha and word not in ("that", "had"):
        yield f"'{token.text}' twice"
    if following is not None and token.text in (",", ";", ":") and following.text in (",", ";", ":", *_ENDS):
        yield "a comma too many"


def _unsure(plural: Token) -> bool:
    """Whether a plural may be a verb that the parse mistakes: 'A puppy chews on a shoe.'"""
    return plural.tag_ == "NNS" and can_be_verb(plural.lower_)
