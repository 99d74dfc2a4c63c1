"""Which words of a parsed sentence to drop, or to put in their place, so that it no longer has a term.

A term is dropped together with what only leads to it, and nothing else. From the term, the rules follow the sentence to
the left and the dependencies upwards: from 'van Gogh' over 'of', 'style' and 'in' to 'painted', from 'gun' over
'holding' to the man who holds it. What follows the term is kept if it may as well belong to the word before: in 'a man
with a gun in a street' the street stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spacy.tokens import Doc, Span, Token

from vce_ray.concepts.language import can_be_verb
from vce_ray.concepts.wording import plural, third_person

FINITE = frozenset(("VBZ", "VBP", "VBD", "MD"))
LEFT = frozenset("det amod compound nummod poss advmod predet nmod quantmod npadvmod neg preconj".split())
MODIFIERS = frozenset("amod compound nmod nummod npadvmod advmod quantmod".split())
COPULAS = frozenset("be appear look seem remain".split())
AMOUNTS = frozenset("pair pool pile set lot number drop piece splash trail stain amount kind type sort bunch".split())
DEPICTIONS = frozenset(
    """painting photo photograph picture image drawing portrait statue sculpture illustration sketch print figurine
    cartoon close-up view study etching engraving poster scene mural silhouette emoji icon rendering depiction artwork
    watercolor collage composition""".split()
)  # fmt: skip
DEPICTS = frozenset("show depict feature contain portray reveal include display present".split())
HANDLES = frozenset("shoot fire draw swing twirl load raise thrust sharpen cock".split())
"""Verbs that tell of a weapon: with 'object' in its place, holding it is what remains."""
PLACES = frozenset(
    """in on at near next against behind beside under over inside outside along across during beneath between among amid
    around above below by through throughout within before atop from while as""".split()
)  # fmt: skip
PEOPLE = frozenset("man men woman women boy boys girl girls person people child children couple figure".split())
LIMBS = frozenset("hand arm finger leg foot".split())
BODY = LIMBS | frozenset("eye face head nose knee shoulder ear chest lip mouth cheek".split())
_AIMS = frozenset("aim point shoot fire hold press".split())
"""Verbs after which 'at' and 'to' tell a target, not a place."""
_COMPLEX = {"to": ("next", "close", "adjacent", "due"), "of": ("front", "top", "middle", "center", "lieu", "out", "instead")}
"""Prepositions of several words, by the last one: 'next to', 'in front of'."""
_CLAUSE_STARTS = frozenset("while as when but whereas".split())
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
            self.put[token.i] + token.whitespace_ if token.i in self.put else
            token.text_with_ws if token.i not in self.drop else " "
            for token in self.doc
        )  # fmt: skip

    def _drop_commas(self) -> None:
        """Drop the commas around what was dropped: both before a verb ('a man, nude, sits'), else one."""
        kept = [token for token in self.doc if token.i not in self.drop or token.i in self.put]
        for before, token, after in zip([None, *kept], kept, [*kept[1:], None]):
            if token.text != "," or before is None or after is None or token.i - before.i == 1 == after.i - token.i:
                continue
            if before.text == ",":
                self.drop.add(token.i)
                if _is_predicate(after) or after.lower_ in ("of", "and"):
                    self.drop.add(before.i)
            elif (token.i - before.i > 1 or after.i - token.i > 1) and _is_predicate(after):
                self.drop.add(token.i)


def _is_predicate(token: Token) -> bool:
    """Whether a token is a finite verb, or a noun in -s that stands like one: 'a woman reclines on a couch'."""
    following = token.doc[token.i + 1].pos_ if token.i + 1 < len(token.doc) else ""
    reads_as_verb = token.tag_ == "NNS" and following in ("ADP", "DET", "SCONJ") and can_be_verb(token.lower_)
    return token.tag_ in (*FINITE, "VB") or reads_as_verb


def lacks_verb(sentence: Span) -> bool:
    """Whether a sentence has no finite verb before its first subordinate clause, as far as the parse knows."""
    for token in sentence:
        if token.lower_ in _CLAUSE_STARTS:
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


# Phrases --------------------------------------------------------------------------------------------------------------


def core(noun: Token) -> list[Token]:
    """Return a noun with what stands before it in its phrase, and its possessive ending."""
    tokens = [noun]
    for child in noun.children:
        if child.dep_ in LEFT and child.i < noun.i:
            tokens += [token for token in child.subtree if token.i < noun.i]
        elif child.dep_ == "case" or (child.dep_ == "punct" and child.i < noun.i and child.text in "-\"'"):
            tokens.append(child)
        elif child.lower_ in ("himself", "herself", "itself", "themselves"):
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
    """Return the conjunction that joins a phrase with this last word to a noun that may take its place ('and a bag')."""
    doc, index = last.doc, last.i + 1
    while index < len(doc) and (doc[index].text == "," or doc[index].pos_ == "CCONJ"):
        index += 1
    noun = next((t for t in doc[index : index + 5] if t.pos_ in ("NOUN", "PROPN")), None)
    if index in (last.i + 1, len(doc)) or noun is None or noun.lower_ in PEOPLE:
        return None
    following = doc[index + 1] if index + 1 < len(doc) else doc[index]
    listed = doc[index].pos_ == "DET" or doc[index - 1].pos_ == "CCONJ" or (
        doc[index].pos_ == "NOUN" and (following.text == "," or following.pos_ == "CCONJ")
    )  # fmt: skip
    return doc[index - 1] if listed and doc[index].pos_ in ("DET", "ADJ", "NOUN", "PROPN", "NUM") else None


def whole_preposition(prep: Token) -> list[Token]:
    """Return all words of a preposition, such as 'in front of', given its last one."""
    words, doc = [prep], prep.doc
    if prep.i > prep.sent.start and doc[prep.i - 1].lower_ in _COMPLEX.get(prep.lower_, ()):
        words.insert(0, doc[prep.i - 1])
        if words[0].i > prep.sent.start and prep.lower_ == "of" and doc[words[0].i - 1].pos_ == "ADP":
            words.insert(0, doc[words[0].i - 1])
    return words


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
    """Drop words that begin a list of adjectives, whatever their parse: 'a nude, smiling woman'. False if they do not."""
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
            target = token.lemma_ in _AIMS and child.lower_ in ("at", "from")
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
        elif child.dep_ in ("relcl", "amod", "acomp", "appos", "oprd"):
            if not any(t.lower_ == "who" for t in child.children):
                edit.cut(child.subtree)


def drop_tail(edit: Edit, token: Token) -> None:
    """Drop the words after a token up to the next comma, finite verb or place: the rest of 'its steeple pointing up'."""
    for word in token.doc[token.i + 1 : token.sent.end]:
        place = word.lower_ in ("in", "on", "at", "near", "beside", "behind") and not _on_someone(word)
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
        if token.text == ";" or (token.lower_ in _CLAUSE_STARTS and any(t.tag_ in FINITE for t in rest)):
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
    elif subject is not None and not relative and verb.tag_ not in FINITE and subject.i not in edit.drop and not any(
        t.dep_ in ("aux", "auxpass") for t in verb.children
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


# Terms ----------------------------------------------------------------------------------------------------------------


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
        if self.parts or term.dep_ in ("amod", "compound") and after is not None and after.pos_ == "NOUN":
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
        if target.lower_ in ("at", "toward", "towards") and term.lemma_ in HANDLES | _AIMS:
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
        elif own is not None and alive and (term.dep_ in ("nsubj", "nsubjpass") or (after and _is_predicate(after))):
            edit.cut(doc[own.i : term.i + 1])  # 'the woman's breasts are'
            if after is not None and after.tag_ == "VBP" and doc[own.i - 1].tag_ != "NNS":
                edit.put[after.i] = third_person(after.text)
        elif owner is not None and after is not None and after.tag_ in ("VBG", "VBN", "VBD", "JJ", "RB", "NN"):
            edit.cut([*phrase, *([link] if link is not None and link.lower_ in ("with", "and") else [])])
            drop_tail(edit, phrase[-1])
        elif link is not None and link.pos_ == "ADP":
            self._after_preposition(term, phrase, link)
        elif link is not None and link.pos_ == "VERB" and link.lemma_ != "be" and term.dep_ not in ("nsubj", "nsubjpass"):
            self._object(term, phrase, link)
        elif term.dep_ in ("conj", "appos") and link is not None and not self._is_subject(term.head):
            self._listed(term, phrase)
        elif link is not None and link.text == "," and (after is None or after.pos_ == "ADP" and _on_someone(after)):
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
        if prep.lower_ == "of" and above.lemma_.lower() in DEPICTIONS and _is_counted(term, phrase) and not self.parts:
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
        if aim.lower_ in ("at", "toward", "towards") and verb.lemma_ in HANDLES | _AIMS:
            edit.cut([*phrase, aim])  # 'aims a rifle at a target'
            edit.put[verb.i] = conjugate("face", verb)
            return
        follower = any(t.pos_ == "VERB" and not any(c.dep_ == "nsubj" for c in t.children) for t in conjuncts(verb))
        finite = verb.tag_ in FINITE or any(t.dep_ == "aux" for t in verb.children)
        if finite and not follower and not self.parts and (verb.lemma_ in DEPICTS or verb.dep_ not in ("conj", "relcl")):
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
            if chunk.start > term.i and edit.has_left(chunk) and not (
                chunk.root.lemma_ in ("style", "front", "top") or edit.doc[chunk.start - 1].lower_ == "of"
            ):
                edit.cut(edit.doc[start : chunk.start])
                return
        edit.cut(term.sent)


def _is_counted(term: Token, phrase: Sequence[Token]) -> bool:
    return term.tag_ in ("NNS", "NNPS") or phrase[0].pos_ in ("DET", "NUM") or phrase[0].tag_ == "PRP$"


def _on_someone(prep: Token) -> bool:
    return any(t.tag_ == "PRP$" for t in prep.doc[prep.i + 1 : prep.i + 2])
