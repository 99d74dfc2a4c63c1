"""English wording: plurals, articles, sentence boundaries, and whole-word matching of terms in running text.

Captions are filtered and checked with the same patterns, so the two can never disagree about what a term matches.
"""

from __future__ import annotations

import re
from functools import lru_cache

_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
}
_UNCHANGED = frozenset({"deer", "sheep", "fish", "aircraft", "watercraft", "elk", "moose"})

_WORD_GAP = r"[\s_\-\u2010-\u2013]+"
"""What may separate the words of a term: white space, underscores, hyphens and dashes."""
_VOWEL_SOUND = re.compile(
    r"(?!uni(?![dmn])|us[aeiu]|eu|ewe|ut[eio]|ur[aei]n|ubiq|uku|u-|one\b|once)[aeiou]|hours?\b|hourly|hourglass|honou?r"
    r"|honest|heir",
    re.IGNORECASE,
)
"""Matches at the start of a word that takes 'an': a vowel that is pronounced as one, or a silent h."""
_STRAIGHT = str.maketrans({"\u2019": "'", "\u201c": '"', "\u201d": '"'})
_ARTICLE = re.compile(
    r"((?<![\w'\u2019-])an?|(?:(?<=[.!?:\"'(] )|(?<=[\"'(])|^)An?)(\s+[\"'(]?)([^\W\d_][\w-]*)",
)
"""An indefinite article, what separates it from the next word, and that word."""

ABBREVIATIONS = "".join(rf"(?<!\b{word}\.)" for word in ("St", "Mr", "Mrs", "Ms", "Dr", "Jr", "Sr", "vs", "Mt", "No"))
"""Lookbehind pattern: the text before this position does not end in an abbreviation, whose full stop ends no
sentence."""


def plural(noun: str) -> str:
    """Return the plural of an English noun phrase. Only its last word is inflected."""
    head, _, last = noun.rpartition(" ")
    lower = last.lower()
    if lower in _UNCHANGED:
        many = last
    elif lower in _IRREGULAR:
        many = last[0] + _IRREGULAR[lower][1:]
    elif re.search(r"[^aeiou]y$", lower):
        many = last[:-1] + "ies"
    elif re.search(r"(?:l|kni|wi|li|lea|thie|loa|shea)fe?$", lower) and not lower.endswith("ff"):
        many = re.sub(r"fe?$", "ves", last)
    else:
        many = last + ("es" if re.search(r"(?:s|x|z|ch|sh)$", lower) else "s")
    return f"{head} {many}" if head else many


@lru_cache(maxsize=256)
def words_pattern(terms: tuple[str, ...]) -> str:
    """Return a regular expression that matches any of the terms as whole words, singular or plural.

    Compile it with re.IGNORECASE. A letter or digit next to a term prevents a match; an underscore, a hyphen or an
    apostrophe does not.
    """
    return rf"(?<![^\W_])(?:{'|'.join(_forms_pattern(term) for term in terms)})(?![^\W_])"


@lru_cache(maxsize=256)
def named_pattern(terms: tuple[str, ...]) -> re.Pattern[str]:
    """Compile `words_pattern` with each term in a group 't<index>', so that a match tells which term it is."""
    named = "|".join(f"(?P<t{i}>{_forms_pattern(term)})" for i, term in enumerate(terms))
    return re.compile(rf"(?<![^\W_])(?:{named})(?![^\W_])", re.IGNORECASE)


def _forms_pattern(term: str) -> str:
    """Alternatives for singular and plural of one term, longest first."""
    forms = sorted({term, plural(term), f"{term}s"}, key=lambda form: (-len(form), form))
    return "|".join(_WORD_GAP.join(re.escape(word) for word in re.split("[ -]", form)) for form in forms).replace(
        "'", "['\u2019]"
    )


def straight_quotes(text: str) -> str:
    """Replace curly quotation marks and apostrophes by straight ones."""
    return text.translate(_STRAIGHT)


def fix_articles(text: str) -> str:
    """Correct 'a' and 'an' to match the sound of the following word.

    An article before a digit or an all-capitals word ('SUV') is kept, because the spelling does not show how it is
    pronounced. A capital 'A' counts as an article only at the start of a sentence.
    """

    def agree(match: re.Match[str]) -> str:
        article, between, word = match.groups()
        if word.isupper() and len(word) > 1:
            return match.group()
        return article[0] + ("n" if _VOWEL_SOUND.match(word) else "") + between + word

    return _ARTICLE.sub(agree, text)
