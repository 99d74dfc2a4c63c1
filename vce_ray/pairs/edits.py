"""Changes to a parsed sentence: words that are dropped, with what cannot stand without them, or replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vce_ray.concepts.wording import word_set
from vce_ray.pairs.phrases import CLAUSE_STARTS, COPULAS, FINITE, conjuncts, core, on_someone, reads_as_verb

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token

AIMS = word_set("aim point shoot fire hold press")
"""Verbs after which 'at' and 'to' tell a target, not a place."""
PLACES = word_set(
    """in on at near next against behind beside under over inside outside along across during beneath between among
    amid around above below by through throughout within before atop from while as"""
)
LIMBS = frozenset(["hand", "arm", "finger", "leg", "foot"])


@dataclass
class Edit:
    """Changes to the tokens of a parsed text."""

    doc: Doc
    drop: set[int] = field(default_factory=set)
    put: dict[int, str] = field(default_factory=dict)

    def cut(self, tokens: Iterable[Token]) -> None:
        """Drop tokens."""
        self.drop |= {token.i for token in tokens}

    def has_left(self, tokens: Iterable[Token]) -> bool:
        """Whether a word with content is left of some tokens."""
        return any(t.i not in self.drop and t.pos_ in ("NOUN", "PROPN", "VERB", "ADJ", "NUM") for t in tokens)

    def text(self) -> str:
        """Return the text after the changes."""
        self._drop_commas()
        if self.doc[-1].text in ".!?":
            self.drop.discard(self.doc[-1].i)
        return "".join(
            self.put[token.i] + token.whitespace_
            if token.i in self.put
            else token.text_with_ws
            if token.i not in self.drop
            else " "
            for token in self.doc
        )

    def _drop_commas(self) -> None:
        """Drop the commas around what was dropped: both before a verb ('a man, nude, sits'), else one."""
        kept = [token for token in self.doc if token.i not in self.drop or token.i in self.put]
        for before, token, after in zip([None, *kept], kept, [*kept[1:], None]):
            if token.text != "," or before is None or after is None or token.i - before.i == 1 == after.i - token.i:
                continue
            if before.text == ",":
                self.drop.add(token.i)
                if reads_as_verb(after) or after.lower_ in ("of", "and"):
                    self.drop.add(before.i)
            elif (token.i - before.i > 1 or after.i - token.i > 1) and reads_as_verb(after):
                self.drop.add(token.i)


def drop_from_list(edit: Edit, token: Token) -> None:
    """Drop the conjunction of a member of a coordination."""
    followers = conjuncts(token)
    if token.dep_ == "conj" and not followers:
        before = [t.i for t in token.head.children if t.dep_ == "cc" and t.i < token.i]
        edit.drop |= set(before[-1:])
    elif followers:
        edit.cut(t for t in token.children if t.dep_ in ("cc", "punct") and token.i < t.i < followers[0].i)


def drop_modifier(edit: Edit, words: Sequence[Token]) -> None:
    """Drop adjectives, or other words before a noun, with their adverbs and the comma of a list of adjectives."""
    doc, token = edit.doc, words[-1]
    edit.cut(words)
    for word in words:
        edit.cut(t for t in word.children if t.dep_ in ("advmod", "npadvmod", "punct") and t.i < word.i)
        if not any(t.i in edit.drop for t in conjuncts(word)):
            drop_from_list(edit, word)
    first = min((t.i for t in doc if t.i in edit.drop and t.i <= token.i and t.sent == token.sent), default=token.i)
    before = doc[first - 1] if first > 0 else None
    after = doc[token.i + 1] if token.i + 1 < len(doc) else None
    if before is not None and before.text == "," and after is not None and after.pos_ in ("NOUN", "ADJ", "PROPN"):
        edit.drop.add(before.i)
    elif after is not None and after.text == "," and before is not None and before.pos_ in ("DET", "NUM"):
        edit.drop.add(after.i)


def starts_list(edit: Edit, words: Sequence[Token]) -> bool:
    """Drop words that begin a list of adjectives, whatever their parse: 'a nude, smiling'. False if they do not."""
    doc, first, last = edit.doc, words[0].i, words[-1].i
    if first == 0 or last + 2 >= len(doc) or doc[first - 1].pos_ != "DET" or doc[last + 1].text != ",":
        return False
    if doc[last + 2].pos_ != "ADJ" and doc[last + 2].tag_ not in ("VBG", "VBN"):
        return False
    edit.cut(doc[first : last + 2])
    return True


def is_segment(edit: Edit, words: Sequence[Token], others: frozenset[str] = frozenset()) -> bool:
    """Drop words that stand alone between commas, with their adverbs, whatever their parse. False if they do not.

    Args:
        others: lemmas of nouns that may stand with them.
    """
    doc, first, last = edit.doc, words[0].i, words[-1].i
    while first > 0 and (doc[first - 1].pos_ == "ADV" or doc[first - 1].lower_ in ("in", "both", *others)):
        first -= 1
    while last + 1 < len(doc) and doc[last + 1].lemma_.lower() in others:
        last += 1
    closed = last + 1 == len(doc) or doc[last + 1].text in (",", ".", ")", ";")
    if not closed or first == 0 or doc[first - 1].text not in (",", "("):
        return False
    if doc[first - 1].text == "," and any(t.pos_ == "CCONJ" for t in doc[last + 1 : last + 3]):
        return False
    edit.cut(doc[first : last + 1])
    return True


def drop_rest(edit: Edit, token: Token) -> None:
    """Drop what follows a dropped noun or verb and makes no sense without it; keep places and what people do."""
    for child in token.children:
        if child.i < token.i or child.i in edit.drop:
            continue
        if child.dep_ in ("prep", "agent", "dative", "prt"):
            own = any(t.tag_ in ("PRP$", "POS") for t in child.subtree)
            target = token.lemma_ in AIMS and child.lower_ in ("at", "from")
            if child.lower_ in PLACES and not own and not target:
                continue
            edit.drop.add(child.i)
            for inner in child.children:
                if inner.dep_ != "pobj":
                    edit.cut(inner.subtree)
                    continue
                for noun in (inner, *inner.conjuncts):
                    edit.cut(core(noun))
                    edit.cut(t for t in noun.children if t.dep_ == "cc")
                    drop_rest(edit, noun)
        elif child.dep_ in ("relcl", "amod", "acomp", "appos", "oprd") and not any(
            t.lower_ == "who" for t in child.children
        ):
            edit.cut(child.subtree)


def drop_tail(edit: Edit, token: Token) -> None:
    """Drop the words after a token up to the next comma, finite verb or place: of 'its steeple pointing upwards'."""
    for word in token.doc[token.i + 1 : token.sent.end]:
        place = word.lower_ in ("in", "on", "at", "near", "beside", "behind") and not on_someone(word)
        if word.is_punct or place or (word.tag_ in FINITE and word.i > token.i + 1):
            return
        edit.drop.add(word.i)


def drop_clause(edit: Edit, verb: Token) -> None:
    """Drop a main clause: from its start to its end, or to another clause that can stand alone ('while ...')."""
    doc, first, last = edit.doc, verb.sent.start, verb.sent.end
    subject = next((t for t in verb.children if t.dep_ in ("nsubj", "nsubjpass")), verb)
    for token in doc[first : min(subject.i, verb.i)]:
        if token.text == ";" or (token.dep_ == "cc" and doc[token.i - 1].text == ","):
            first = token.i
    for token in doc[verb.i : last]:
        rest = doc[token.i + 1 : last]
        if token.text == ";" or (token.lower_ in CLAUSE_STARTS and any(t.tag_ in FINITE for t in rest)):
            last = token.i + 1
            break
    edit.cut(doc[first:last])
    edit.put = {i: word for i, word in edit.put.items() if i not in range(first, last)}


def drop_predicate(edit: Edit, verb: Token) -> None:
    """Drop a verb that has lost its object or complement, and of its clause what cannot stand without it."""
    helpers = [t for t in verb.children if t.dep_ in ("aux", "auxpass", "neg", "prt", "mark", "expl")]
    helpers += [t for t in verb.children if t.dep_ == "advmod" and t.i < verb.i]
    subject = next((t for t in verb.children if t.dep_ in ("nsubj", "nsubjpass")), None)
    relative = subject is not None and any(t.tag_ in ("WDT", "WP", "WP$") for t in subject.subtree)  # 'one of whom'
    follower = next((t for t in conjuncts(verb) if t.pos_ in ("VERB", "AUX")), None)
    own_subject = follower is not None and any(t.dep_ in ("nsubj", "nsubjpass") for t in follower.children)
    edit.drop.add(verb.i)
    if follower is not None and not own_subject:
        drop_from_list(edit, verb)
        if any(t.dep_ in ("aux", "auxpass") for t in follower.children) or follower.tag_ in (*FINITE, "VB"):
            edit.cut(helpers)  # 'is naked and is looking'
        elif verb.lemma_ == "be" and follower.tag_ in ("VBG", "VBN"):
            edit.drop.discard(verb.i)  # 'is naked and looking'
    elif verb.dep_ == "conj":
        drop_from_list(edit, verb)
        edit.cut(verb.subtree if subject is not None and not relative else helpers)
    elif (
        subject is not None
        and not relative
        and verb.tag_ not in FINITE
        and subject.i not in edit.drop
        and not any(t.dep_ in ("aux", "auxpass") for t in verb.children)
    ):  # 'her long hair covering her breasts'
        edit.cut(helpers)
        first = min(t.i for t in subject.subtree)
        if subject.lemma_ in LIMBS:
            edit.cut(subject.subtree)
            edit.cut(t for t in edit.doc[first - 1 : first] if t.lower_ == "with")
        elif edit.doc[first - 1].lower_ != "with":
            edit.put[first] = f"with {edit.doc[first].text}"
    else:
        edit.cut(helpers)
        if relative and subject is not None:
            edit.cut(subject.subtree)
        if verb.dep_ == "xcomp" and verb.head.lemma_ in COPULAS:
            drop_predicate(edit, verb.head)
        if verb.dep_ == "pcomp":
            edit.drop.add(verb.head.i)
