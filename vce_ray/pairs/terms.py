"""Which words to drop or replace so that a sentence no longer has a term of an object or of explicit content.

A term is dropped together with what only leads to it, and nothing else. From the term, the rules follow the sentence to
the left and the dependencies upwards: from 'gun' over 'holding' to the man who holds it. What follows the term is kept
if it may as well belong to the word before: in 'a man with a gun in a street' the street stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vce_ray.concepts.wording import plural, third_person, word_set
from vce_ray.pairs.edits import (
    AIMS,
    LIMBS,
    Edit,
    drop_clause,
    drop_from_list,
    drop_modifier,
    drop_predicate,
    drop_rest,
    drop_tail,
    is_segment,
    starts_list,
)
from vce_ray.pairs.phrases import (
    COPULAS,
    DEPICTIONS,
    FINITE,
    MODIFIERS,
    conjuncts,
    followed_by,
    is_hidden_verb,
    lead,
    on_someone,
    reads_as_verb,
    whole_preposition,
)

if TYPE_CHECKING:
    from spacy.tokens import Token

AMOUNTS = word_set("""pair pool pile set lot number drop piece splash trail stain amount kind type sort bunch""")
DEPICTS = word_set("show depict feature contain portray reveal include display present")
HANDLES = word_set("shoot fire draw swing twirl load raise thrust sharpen cock")
"""Verbs that tell of a weapon: with 'object' in its place, holding it is what remains."""
BODY = LIMBS | word_set("eye face head nose knee shoulder ear chest lip mouth cheek")
_FORMS = {
    "stand": ("stand", "stands", "standing", "stood", "stood"),
    "meet": ("meet", "meets", "meeting", "met", "met"),
    "hold": ("hold", "holds", "holding", "held", "held"),
    "face": ("face", "faces", "facing", "faced", "faced"),
}
_TAGS = {"VB": 0, "VBP": 0, "NN": 0, "VBZ": 1, "NNS": 1, "VBG": 2, "VBD": 3, "VBN": 4}


def conjugate(verb: str, like: Token) -> str:
    """Return a verb of _FORMS in the form of a token."""
    return _FORMS[verb][2 if like.lower_.endswith("ing") else _TAGS.get(like.tag_, 2)]


class TermRules:
    """Drops a part or attribute of what is depicted, or puts a harmless noun in its place.

    Args:
        stand_in: the noun; '' drops the phrase in any case.
        whole: noun that the concept has been replaced by, of which the term may be a part.
        parts: the terms are parts of a thing ('antler'), not things of their own ('gun').
    """

    def __init__(self, edit: Edit, stand_in: str, whole: str = "", parts: bool = False):
        self.edit, self.stand_in, self.whole, self.parts = edit, stand_in or whole, whole, parts

    def drop(self, words: Sequence[Token]) -> None:
        """Drop a term of these words."""
        edit, doc = self.edit, self.edit.doc
        term = next((t for t in words if t.head not in words), words[-1])
        after = doc[words[-1].i + 1] if words[-1].i + 1 < len(doc) else None
        if len(words) == 1 and self._is_action(term, after):
            return self._action(term)
        if words[0].tag_ in ("VBG", "VBN") and after is not None and after.lower_ == "but":  # 'wearing nothing but'
            return edit.cut([*words[1:], after])
        edit.cut(words)
        if words[0].pos_ == "ADP" or starts_list(edit, words) or is_segment(edit, words):  # 'in the nude'
            return None
        if words[-1].head.i > words[-1].i and self._describes(words[-1], after):
            noun = words[-1].head
            phrase, link = lead(noun)
            if noun.lemma_ in BODY and link is not None and link.lower_ == "with" and len(phrase) == len(words) + 2:
                return edit.cut([link, *phrase])  # 'with a wounded leg'
            return drop_modifier(edit, words)
        if term.dep_ == "attr" and term.head.lemma_ in COPULAS and not _is_counted(term, lead(term)[0]):
            return self._adjective(term)  # 'is shirtless', which the parse takes for a noun
        if term.pos_ in ("ADJ", "ADV", "VERB", "AUX") and not (term.pos_ == "ADJ" and lead(term)[0][0].pos_ == "DET"):
            return self._adjective(term)
        return self._noun(words[-1], after)

    def _describes(self, word: Token, after: Token | None) -> bool:
        """Whether a word belongs to a noun after it, which is not its own participle: 'a pistol drawn'."""
        if after is None or after.pos_ not in ("NOUN", "PROPN", "ADJ", "NUM", "VERB", "PUNCT", "CCONJ"):
            return False
        if word.pos_ in ("NOUN", "PROPN"):
            return after.pos_ in ("NOUN", "PROPN") and not after.lower_.endswith("ing") and not is_hidden_verb(after)
        return word.dep_ in (*MODIFIERS, "conj") and after.tag_ not in FINITE

    def _is_action(self, term: Token, after: Token | None) -> bool:
        if self.parts or (term.dep_ in ("amod", "compound") and after is not None and after.pos_ == "NOUN"):
            return False
        agent = any(t.dep_ == "agent" for t in term.children)
        if term.tag_ == "VBN" or term.lower_.endswith("ed"):
            return agent
        gerund = term.lower_.endswith("ing") and term.i > 0 and term.doc[term.i - 1].pos_ in ("NOUN", "AUX", "PROPN")
        return term.pos_ == "VERB" or gerund or is_hidden_verb(term)

    def _action(self, term: Token) -> None:
        """Replace an action by standing, or by meeting if it is done to someone."""
        done_to = any(t.dep_ in ("agent", "dobj") for t in term.children)
        target = self.edit.doc[term.i + 1] if term.i + 1 < len(self.edit.doc) else term
        if target.lower_ in ("at", "toward", "towards") and term.lemma_ in HANDLES | AIMS:
            self.edit.drop.add(target.i)
            self.edit.put[term.i] = conjugate("face", term)
            return
        armed = term.lemma_ in HANDLES and any(t.dep_ == "dobj" for t in term.children)
        self.edit.put[term.i] = conjugate("hold" if armed else "meet" if done_to else "stand", term)

    def _adjective(self, term: Token) -> None:
        edit, up = self.edit, term.head
        edit.cut(t for t in term.children if t.dep_ in ("advmod", "npadvmod", "neg") and t.i < term.i)
        edit.cut(t for prep in term.children if prep.lower_ == "from" and prep.i == term.i + 1 for t in prep.subtree)
        edit.cut(t for t in edit.doc[term.i + 1 : term.i + 5] if t.lower_ in ("up", "down") and t.i - 1 in edit.drop)
        listed = term.dep_ == "conj" or any(t.tag_ not in FINITE for t in conjuncts(term))
        if term.dep_ in ("acomp", "attr", "oprd") and up.lemma_ in COPULAS and up.pos_ in ("AUX", "VERB"):
            drop_from_list(edit, term) if listed else drop_predicate(edit, up)
        elif any(t.dep_ in ("auxpass", "aux") for t in term.children):
            drop_predicate(edit, term)
        else:
            drop_from_list(edit, term)
            edit.cut(t for t in term.children if t.tag_ in ("WDT", "WP"))

    def _noun(self, term: Token, after: Token | None) -> None:
        edit, doc = self.edit, self.edit.doc
        phrase, link = lead(term)
        owner = phrase[0] if phrase[0].tag_ == "PRP$" else None
        own = next((t for t in phrase if t.tag_ == "POS"), None)
        alive = self.parts or self.stand_in == "person"
        part_of = next((t for t in term.children if t.lower_ == "of"), None)
        if part_of is not None and any(t.lemma_.lower() == self.whole != "" for t in part_of.children):
            edit.cut([*phrase, part_of])  # 'the bell tower of the building'
            if term.dep_ == "nsubj" and term.tag_ == "NNS" and term.head.tag_ in ("VBP", "VB") and any(
                t.tag_ == "NN" for t in part_of.children
            ):  # fmt: skip
                edit.put[term.head.i] = third_person(term.head.text)
        elif own is not None and alive and (term.dep_ in ("nsubj", "nsubjpass") or (after and reads_as_verb(after))):
            edit.cut(doc[own.i : term.i + 1])  # 'the woman's breasts are'
            if after is not None and after.tag_ == "VBP" and doc[own.i - 1].tag_ != "NNS":
                edit.put[after.i] = third_person(after.text)
        elif owner is not None and after is not None and after.tag_ in ("VBG", "VBN", "VBD", "JJ", "RB", "NN"):
            edit.cut([*phrase, *([link] if link is not None and link.lower_ in ("with", "and") else [])])
            drop_tail(edit, phrase[-1])
        elif link is not None and link.pos_ == "ADP":
            self._after_preposition(term, phrase, link)
        elif (
            link is not None and link.pos_ == "VERB" and link.lemma_ != "be" and term.dep_ not in ("nsubj", "nsubjpass")
        ):
            self._object(term, phrase, link)
        elif (term.dep_ in ("conj", "appos") and link is not None and not self._is_subject(term.head)) or (
            link is not None and link.text == "," and (after is None or (after.pos_ == "ADP" and on_someone(after)))
        ):
            self._listed(term, phrase)
        elif owner is not None and term.dep_ in ("nsubj", "nsubjpass"):
            drop_clause(edit, term.head)
        elif conjuncts(term) and not self.stand_in:
            edit.cut(phrase)
            drop_from_list(edit, term)
        else:
            self._stand_in(term, phrase)
        if after is not None and after.tag_ in ("VBN", "JJ") and term.i in edit.drop and term.i not in edit.put:
            following = doc[after.i + 1] if after.i + 1 < len(doc) else None
            if following is None or following.is_punct or following.tag_ in FINITE:  # 'a pistol drawn'
                edit.drop.add(after.i)

    @staticmethod
    def _is_subject(head: Token) -> bool:
        return head.dep_ in ("nsubj", "nsubjpass") and head.head.tag_ in ("VBP", "VB", "VBN", "VBG")

    def _listed(self, term: Token, phrase: list[Token]) -> None:
        edit, first = self.edit, phrase[0].i
        edit.cut(phrase)
        drop_rest(edit, term)
        before = edit.doc[first - 1]
        following = [t for t in edit.doc[term.i + 1 : term.i + 3] if t.pos_ == "CCONJ" or t.text == ","]
        if before.text == "," or not following:
            edit.drop.add(before.i)
        if before.pos_ == "CCONJ" and edit.doc[first - 2].text == ",":
            edit.drop.add(first - 2)

    def _after_preposition(self, term: Token, phrase: list[Token], prep: Token) -> None:
        edit, above = self.edit, prep.head
        last = term
        spread = edit.doc[term.i + 1] if term.i + 1 < len(edit.doc) else term
        if not _is_counted(term, phrase) and spread.lower_ in ("on", "over", "across"):  # 'with blood on the carpet'
            last = next((t for t in edit.doc[term.i + 2 : term.sent.end] if t.pos_ == "NOUN"), term)
            edit.cut(edit.doc[term.i + 1 : last.i + 1])
        worn = last is not term and edit.doc[term.i + 2].tag_ == "PRP$"  # 'with blood on their face and clothes'
        if not worn and (joined := followed_by(last)):
            edit.cut([*phrase, *edit.doc[last.i + 1 : joined.i + 1]])
            return
        if prep.lower_ == "of" and above.pos_ == "NOUN" and above.lemma_.lower() in AMOUNTS:
            edit.cut([prep, *phrase])
            drop_rest(edit, term)
            amount, link = lead(above)
            edit.cut(amount)
            if link is not None and link.pos_ == "ADP":
                self._after_preposition(above, amount, link)
            elif link is not None and link.pos_ == "VERB" and above.dep_ == "dobj":
                self._object(above, amount, link)
            else:
                self._stand_in(term, phrase)
                edit.drop -= {t.i for t in (prep, *amount)}
            return
        if prep.lower_ == "of" and above.lemma_.lower() in DEPICTIONS and _is_counted(term, phrase):
            self._stand_in(term, phrase)
            return
        edit.cut([*whole_preposition(prep), *phrase])
        if prep.i > 0 and edit.doc[prep.i - 1].dep_ in ("prep", "advmod") and edit.doc[prep.i - 1].head == prep:
            edit.drop.add(prep.i - 1)
        drop_rest(edit, term)
        if above.tag_ == "VBN" and not edit.has_left(t for t in above.subtree if t.i > above.i):
            drop_predicate(edit, above)

    def _object(self, term: Token, phrase: list[Token], verb: Token) -> None:
        edit = self.edit
        if joined := followed_by(term):
            edit.cut([*phrase, *edit.doc[term.i + 1 : joined.i + 1]])
            return
        aim = edit.doc[term.i + 1] if term.i + 1 < len(edit.doc) else term
        if aim.lower_ in ("at", "toward", "towards") and verb.lemma_ in HANDLES | AIMS:
            edit.cut([*phrase, aim])  # 'aims a rifle at a target'
            edit.put[verb.i] = conjugate("face", verb)
            return
        follower = any(t.pos_ == "VERB" and not any(c.dep_ == "nsubj" for c in t.children) for t in conjuncts(verb))
        finite = verb.tag_ in FINITE or any(t.dep_ == "aux" for t in verb.children)
        if (
            finite
            and not follower
            and not self.parts
            and (verb.lemma_ in DEPICTS or verb.dep_ not in ("conj", "relcl"))
        ):
            self._stand_in(term, phrase)
            if verb.lemma_ in HANDLES and term.i in edit.put:
                edit.put[verb.i] = conjugate("hold", verb)
            if term.i in edit.put:
                return
        edit.cut(phrase)
        drop_rest(edit, term)
        drop_predicate(edit, verb)
        drop_rest(edit, verb)

    def _stand_in(self, term: Token, phrase: list[Token]) -> None:
        """Put the harmless noun in the place of a term; without one, drop what comes before the next noun phrase."""
        edit = self.edit
        if self.stand_in and _is_counted(term, phrase):
            edit.drop.discard(term.i)
            edit.put[term.i] = plural(self.stand_in) if term.tag_ in ("NNS", "NNPS") else self.stand_in
            return
        edit.cut(phrase)
        start = term.sent.start
        for chunk in edit.doc.noun_chunks:
            if (
                chunk.start > term.i
                and edit.has_left(chunk)
                and not (chunk.root.lemma_ in ("style", "front", "top") or edit.doc[chunk.start - 1].lower_ == "of")
            ):
                edit.cut(edit.doc[start : chunk.start])
                return
        edit.cut(term.sent)


def _is_counted(term: Token, phrase: Sequence[Token]) -> bool:
    return term.tag_ in ("NNS", "NNPS") or phrase[0].pos_ in ("DET", "NUM") or phrase[0].tag_ == "PRP$"
