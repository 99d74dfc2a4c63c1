"""Finds the terms of a concept in running text, without a parse.

Words are compared in a folded form: compatibility characters (full-width letters), letter case, accents, hyphens and
possessives make no difference. A term is found in singular and plural; the name of an artist also misspelt or with an
ending ('Van Gough', 'Picassoesque'); Chinese, Japanese and Korean characters and emoji need no spaces around them.
Where terms overlap the longest one counts, and so does a phrase in which a word means something else ('hot dog').
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz.distance import OSA

from vce_ray.concepts.language import is_word
from vce_ray.concepts.wording import plurals

_PICTOGRAPH = r"[\u2600-\u27bf\U0001f000-\U0001faff]"
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_INVISIBLE = r"\u0300-\u036f\u00ad\u200b-\u200d\u2060\ufe0f\ufeff"
"""Combining accents, soft hyphens, zero-width characters."""
_TOKEN = re.compile(
    rf"{_CJK}|{_PICTOGRAPH}[{_INVISIBLE}]*|(?:(?!{_CJK})[^\W_])(?:(?!{_CJK})[^\W_]|[{_INVISIBLE}]+(?=[^\W_]))*"
    rf"[\u0300-\u036f]*"
)
_GAP = re.compile(r"[\s_'\u2019\u2010-\u2013&-]+|\.\s?")
"""What may separate the words of a term."""
_NAME_ENDINGS = ("esque", "ian", "ish", "like")
FUZZY_LENGTH = 6
"""Letters of the shortest name, without spaces, that is also found misspelt."""


@dataclass(frozen=True)
class Match:
    """One occurrence of a term in a text."""

    term: str
    start: int
    end: int
    """Characters [start, end) of the text."""
    plural: bool
    """The term is in a form that is only a plural. False for 'deer', which may be either."""
    named: bool
    """It is the plain or possessive form of an artist's name, spelt in any way."""


@dataclass(frozen=True)
class _Word:
    text: str
    folded: str
    start: int
    end: int


@dataclass(frozen=True)
class _Form:
    """One form of a term; the term is '' for a phrase with another sense."""

    term: str
    plural: bool = False
    named: bool = False
    capitals: tuple[bool, ...] = ()
    """Words that must have a capital in the text: those of a title, such as 'Starry Night'."""


class TermTable:
    """The terms of a concept, ready to be looked up.

    Args:
        terms: terms to find.
        artists: those of them that are names of artists.
        titles: those of them that are titles of works; found only if their words are capitalized.
        other_senses: phrases that contain a term but mean something else. One with a capital is found with it only.
    """

    def __init__(
        self,
        terms: Iterable[str],
        artists: Iterable[str] = (),
        titles: Iterable[str] = (),
        other_senses: Iterable[str] = (),
    ):
        self._forms: dict[tuple[str, ...], list[_Form]] = {}
        self._artists: list[tuple[str, str]] = []
        """Names of artists without spaces, and their terms."""
        artists, titles = frozenset(artists), frozenset(titles)
        for phrase in other_senses:
            capitals = tuple(word.text.istitle() for word in words_of(phrase))
            for form in (phrase, *plurals(phrase)):
                self._add(form, _Form("", capitals=capitals))
        for term in terms:
            capitals = tuple(word.text[0].isupper() for word in words_of(term)) if term in titles else ()
            self._add(term, _Form(term, capitals=capitals, named=term in artists))
            for form in plurals(term):
                self._add(form, _Form(term, plural=True, capitals=capitals))
            if term in artists:
                joined = "".join(_key(term))
                self._add(joined, _Form(term, named=True))
                for ending in _NAME_ENDINGS:
                    self._add(term + ending, _Form(term))
                    self._add(joined + ending, _Form(term))
                if len(joined) >= FUZZY_LENGTH:
                    self._artists.append((joined, term))
        self._longest = max((len(key) for key in self._forms), default=0)

    def _add(self, text: str, form: _Form) -> None:
        forms = self._forms.setdefault(_key(text), [])
        if all((other.term, other.capitals) != (form.term, form.capitals) for other in forms):
            forms.append(form)

    def find(self, text: str) -> Iterator[Match]:
        """Yield the terms in a text, from left to right, without overlap."""
        words = words_of(text)
        index = 0
        while index < len(words):
            count, form = self._at(text, words, index)
            if form and form.term:
                start, end = words[index].start, words[index + count - 1].end
                yield Match(form.term, start, end, form.plural, form.named)
            index += count

    def _at(self, text: str, words: Sequence[_Word], index: int) -> tuple[int, _Form | None]:
        """Return how many words the longest form at this position has, and the form; 1 and None if there is none."""
        reach = _reach(text, words, index, self._longest)
        for count in range(reach, 0, -1):
            found = words[index : index + count]
            for form in self._forms.get(tuple(word.folded for word in found), ()):
                if _has_capitals(found, form):
                    return count, form
        if self._artists:
            for count in range(min(3, reach), 0, -1):
                joined = "".join(word.folded for word in words[index : index + count])
                if term := self._misspelt(joined):
                    return count, _Form(term, named=True)
        return 1, None

    def _misspelt(self, word: str) -> str:
        """Return the artist whose misspelt name a word is, or ''."""
        for name, term in self._artists:
            same_letters = " " not in term and len(name) > FUZZY_LENGTH and set(word) == set(name)  # 'Piccaso'
            allowed = 2 if same_letters else 1
            if word[:1] != name[0] or abs(len(word) - len(name)) > 1:
                continue
            if OSA.distance(word, name, score_cutoff=allowed) <= allowed and not is_word(word):
                return term
        return ""


@lru_cache(maxsize=1024)
def words_of(text: str) -> tuple[_Word, ...]:
    """Return the words of a text in folded form, with where they stand in it."""
    return tuple(_Word(m.group(), _fold(m.group()), m.start(), m.end()) for m in _TOKEN.finditer(text))


def _key(text: str) -> tuple[str, ...]:
    return tuple(word.folded for word in words_of(text))


def _fold(word: str) -> str:
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", word).casefold())
    return "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))


def _reach(text: str, words: Sequence[_Word], index: int, most: int) -> int:
    """Return how many words from this one on, at most `most`, are separated by nothing that ends a term."""
    count = 1
    while count < most and index + count < len(words):
        one, other = words[index + count - 1], words[index + count]
        gap = text[one.end : other.start]
        if not (_GAP.fullmatch(gap) if gap else re.match(_CJK, one.text) or re.match(_CJK, other.text)):
            break
        count += 1
    return count


def _has_capitals(words: Sequence[_Word], form: _Form) -> bool:
    if not form.capitals:
        return True
    if form.term:
        return all(word.text[0].isupper() for word, capital in zip(words, form.capitals) if capital)
    return all(word.text.istitle() for word, capital in zip(words, form.capitals) if capital)
