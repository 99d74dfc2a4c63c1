"""English wording: plurals, articles and sentence boundaries."""

from __future__ import annotations

import re

_IRREGULAR = {
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "louse": "lice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
    "cactus": "cacti",
    "fungus": "fungi",
    "octopus": "octopuses",
}
_UNCHANGED = frozenset(
    {
        "deer",
        "reindeer",
        "caribou",
        "sheep",
        "fish",
        "aircraft",
        "watercraft",
        "elk",
        "moose",
        "swine",
        "bison",
        "series",
    }
)
_VES = re.compile(r"(?:(?<!go)(?<!gu)l|kni|wi|li|lea|thie|loa|shea|hoo|scar|whar|dwar)fe?$")
"""Nouns with -ves: wolf, shelf, knife, leaf, hoof, scarf."""
_OES = re.compile(r"(?:her|tomat|potat|ech|torped|mosquit|mang|buffal|volcan|tornad|domin|carg)o$")
"""Nouns in -o with -es; the others have -s: photos, pianos, Picassos."""

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


def word_set(words: str) -> frozenset[str]:
    """Return a set of words, given in one text."""
    return frozenset(words.split())


def plural(noun: str) -> str:
    """Return the plural of an English noun phrase. Only its last word is inflected."""
    head, _, last = noun.rpartition(" ")
    lower = last.lower()
    if lower in _UNCHANGED or not last.isascii():
        many = last
    elif lower in _IRREGULAR:
        many = last[0] + _IRREGULAR[lower][1:]
    elif re.search(r"(?<!hu)(?<!ger)(?<!ro)man$", lower):
        many = last[:-2] + "en"
    elif re.search(r"[^aeiou]y$", lower):
        many = last[:-1] + "ies"
    elif _VES.search(lower):
        many = re.sub(r"fe?$", "ves", last)
    else:
        many = last + ("es" if re.search(r"(?:s|x|z|ch|sh)$", lower) or _OES.search(lower) else "s")
    return f"{head} {many}" if head else many


def plurals(noun: str) -> set[str]:
    """Return the plural of a noun phrase, and the regular one that captioners may write in its place ('hoofs')."""
    return {plural(noun), f"{noun}s", *([f"{noun}es"] if noun.endswith("o") else [])} - {noun}


_SENTENCE_GAP = re.compile(
    rf"(?:(?<=[^\W\d_]{{2}}[.!?]){ABBREVIATIONS}|(?<=[\")][.!?])|(?<=[^\W\d_]{{2}}[.!?][\")]))\s+(?=[\"'(]?[A-Z])"
)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text in one line."""
    return _SENTENCE_GAP.split(text)


def third_person(verb: str) -> str:
    """Return the form of a verb in the present that goes with a singular: 'stands' of 'stand'."""
    irregular = {"are": "is", "have": "has", "do": "does", "were": "was"}
    return irregular.get(verb) or plural(verb)


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
