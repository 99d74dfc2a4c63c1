"""What a parsed sentence is made of: noun phrases, coordinations, prepositions, and verbs that a parse mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vce_ray.concepts.language import can_be_verb
from vce_ray.concepts.wording import word_set

if TYPE_CHECKING:
    from spacy.tokens import Span, Token

FINITE = frozenset(("VBZ", "VBP", "VBD", "MD"))
LEFT = word_set("det amod compound nummod poss advmod predet nmod quantmod npadvmod neg preconj")
MODIFIERS = word_set("amod compound nmod nummod npadvmod advmod quantmod")
COPULAS = frozenset(["be", "appear", "look", "seem", "remain"])
DEPICTIONS = word_set(
    """painting photo photograph picture image drawing portrait statue sculpture illustration sketch print figurine
    cartoon close-up view study etching engraving poster scene mural silhouette emoji icon rendering depiction
    artwork watercolor collage composition"""
)
PEOPLE = word_set("man men woman women boy boys girl girls person people child children couple figure")
CLAUSE_STARTS = frozenset(["while", "as", "when", "but", "whereas"])
_COMPLEX = {
    "to": ("next", "close", "adjacent", "due"),
    "of": ("front", "top", "middle", "center", "lieu", "out", "instead"),
}
"""Prepositions of several words, by the last one: 'next to', 'in front of'."""


def core(noun: Token) -> list[Token]:
    """Return a noun with what stands before it in its phrase, and its possessive ending."""
    tokens = [noun]
    for child in noun.children:
        if child.dep_ in LEFT and child.i < noun.i:
            tokens += [token for token in child.subtree if token.i < noun.i]
        elif (
            child.dep_ == "case"
            or (child.dep_ == "punct" and child.i < noun.i and child.text in "-\"'")
            or child.lower_ in ("himself", "herself", "itself", "themselves")
        ):
            tokens.append(child)
    return tokens


def lead(noun: Token) -> tuple[list[Token], Token | None]:
    """Return what stands before a noun in its phrase by the order of words, with the noun, and the word before that."""
    tokens, doc = [noun], noun.doc
    while tokens[0].i > noun.sent.start:
        left = doc[tokens[0].i - 1]
        comma = left.text == "," and left.i > noun.sent.start and doc[left.i - 1].pos_ == "ADJ" == tokens[0].pos_
        listed = left.pos_ == "CCONJ" and left.i > noun.sent.start and doc[left.i - 1].pos_ == "ADJ" == tokens[0].pos_
        if listed and doc[left.i - 1].i > noun.sent.start:
            tokens.insert(0, left)
            continue
        if left.pos_ not in ("DET", "ADJ", "NOUN", "PROPN", "NUM", "ADV", "PART") and left.tag_ != "PRP$" and not (
            left.text == "-" or comma or (left.tag_ in ("VBN", "VBG") and left.dep_ == "amod")
        ):  # fmt: skip
            return tokens, left
        tokens.insert(0, left)
        if left.pos_ == "DET" or left.tag_ == "PRP$":
            return tokens, doc[left.i - 1] if left.i > noun.sent.start else None
    return tokens, None


def conjuncts(token: Token) -> list[Token]:
    """Return the conjuncts that depend on a token directly."""
    return [child for child in token.children if child.dep_ == "conj"]


def followed_by(last: Token) -> Token | None:
    """Return the conjunction that joins a phrase, given its last word, to a noun that may take its place."""
    doc, index = last.doc, last.i + 1
    while index < len(doc) and (doc[index].text == "," or doc[index].pos_ == "CCONJ"):
        index += 1
    noun = next((t for t in doc[index : index + 5] if t.pos_ in ("NOUN", "PROPN")), None)
    if index in (last.i + 1, len(doc)) or noun is None or noun.lower_ in PEOPLE:
        return None
    following = doc[index + 1] if index + 1 < len(doc) else doc[index]
    listed = (
        doc[index].pos_ == "DET"
        or doc[index - 1].pos_ == "CCONJ"
        or (doc[index].pos_ == "NOUN" and (following.text == "," or following.pos_ == "CCONJ"))
    )
    return doc[index - 1] if listed and doc[index].pos_ in ("DET", "ADJ", "NOUN", "PROPN", "NUM") else None


def whole_preposition(prep: Token) -> list[Token]:
    """Return all words of a preposition, such as 'in front of', given its last one."""
    words, doc = [prep], prep.doc
    if prep.i > prep.sent.start and doc[prep.i - 1].lower_ in _COMPLEX.get(prep.lower_, ()):
        words.insert(0, doc[prep.i - 1])
        if words[0].i > prep.sent.start and prep.lower_ == "of" and doc[words[0].i - 1].pos_ == "ADP":
            words.insert(0, doc[words[0].i - 1])
    return words


def on_someone(prep: Token) -> bool:
    """Whether a possessive pronoun follows: 'on her face'."""
    return any(t.tag_ == "PRP$" for t in prep.doc[prep.i + 1 : prep.i + 2])


def reads_as_verb(token: Token) -> bool:
    """Whether a token is a finite verb, or a noun in -s that stands like one: 'a woman reclines on a couch'."""
    following = token.doc[token.i + 1].pos_ if token.i + 1 < len(token.doc) else ""
    mistaken = token.tag_ == "NNS" and following in ("ADP", "DET", "SCONJ") and can_be_verb(token.lower_)
    return token.tag_ in (*FINITE, "VB") or mistaken


def lacks_verb(sentence: Span) -> bool:
    """Whether a sentence has no finite verb before its first subordinate clause, as far as the parse knows."""
    for token in sentence:
        if token.lower_ in CLAUSE_STARTS:
            break
        if token.tag_ in FINITE:
            return False
    return True


def is_hidden_verb(token: Token) -> bool:
    """Whether a noun is a verb that the parse mistakes: 'a mane gallops', 'in lingerie poses on', 'two men fight'."""
    if token.tag_ not in ("NN", "NNS") or token.i == token.sent.start or not can_be_verb(token.lower_):
        return False
    if token.doc[token.i - 1].pos_ not in ("NOUN", "PROPN"):
        return False
    first = lead(token)[0][0].lower_
    if token.tag_ == "NNS" and first in ("a", "an"):
        return True
    if token.tag_ == "NN" and first in ("a", "an", "the", "this", "that", "each", "every", "his", "her", "its"):
        return False  # 'a street brawl', but 'two men fight'
    following = token.doc[token.i + 1].pos_ if token.i + 1 < len(token.doc) else "PUNCT"
    return following in ("ADP", "DET", "SCONJ", "ADV") and lacks_verb(token.sent)
