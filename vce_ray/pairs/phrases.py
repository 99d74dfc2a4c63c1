"""Which words of a parsed sentence to drop, or to put in their place, so that it no longer has a term.

A term is dropped together with what only leads to it, and nothing else. From the term, the rules follow the dependencies
upwards: from 'van Gogh' over 'of', 'style' and 'in' to 'painted', from 'gun' over 'holding' to the man who holds it.
What hangs on the term itself from the right is kept if it may as well belong to the word before: in 'a man with a gun
in a street' the street stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from spacy.tokens import Doc, Token

from vce_ray.concepts.wording import plural

STYLE_NOUNS = frozenset(
    """style manner aesthetic technique tradition spirit vein fashion palette look brushwork brushstroke stroke approach
    work artwork art masterpiece hand school influence essence resemblance similarity homage nod tribute take reference
    hint echo period series oeuvre signature repetition chiaroscuro impasto feel touch mood flair way genre language
    idiom lens eye period version method lighting effect quality reminder imitation silkscreen canvas color colour swirl
    pattern theme element""".split()
)  # fmt: skip
"""Nouns that lead to an artist: 'the brushwork of'."""
MADE = frozenset(
    """do paint draw render create make execute design illustrate depict present portray compose style stylize print
    craft produce inspire influence attribute base model set""".split()
)  # fmt: skip
LIKENESS = frozenset(
    """reminiscent evocative characteristic typical similar akin like reflective indicative suggestive recognizable
    famous known""".split()
)  # fmt: skip
HOLDS = frozenset("hold carry wield brandish clutch wear have grip bear sport reveal expose display cover".split())
"""Verbs that a phrase does without once their object is gone: 'a man (holding a gun) in a street'."""
DEPICTIONS = frozenset(
    """painting photo photograph picture image drawing portrait statue sculpture illustration sketch print render
    figurine figure cartoon close-up view study etching engraving poster scene mural silhouette emoji pencil icon
    rendering depiction artwork watercolor collage series number""".split()
)  # fmt: skip
AMOUNTS = frozenset("pair pool pile set lot number drop piece splash trail stain amount kind type sort bunch".split())
PLACES = frozenset(
    """in on at near against behind beside under over inside outside along across during beneath between among amid
    around above below by through throughout within before atop from""".split()
)  # fmt: skip
LEFT = frozenset("det amod compound nummod poss advmod predet nmod quantmod npadvmod neg case preconj".split())
MODIFIERS = frozenset("amod compound nmod nummod npadvmod advmod quantmod".split())
_STAND = {"VB": "stand", "VBP": "stand", "VBZ": "stands", "VBG": "standing", "VBD": "stood", "VBN": "stood"}
_MEET = {"VB": "meet", "VBP": "meet", "VBZ": "meets", "VBG": "meeting", "VBD": "met", "VBN": "met"}


@dataclass
class Edit:
    """Changes to the tokens of a parsed text."""

    doc: Doc
    drop: set[int] = field(default_factory=set)
    put: dict[int, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the text after the changes."""
        pieces = (
            self.put[token.i] + token.whitespace_ if token.i in self.put else
            token.text_with_ws if token.i not in self.drop else " "
            for token in self.doc
        )  # fmt: skip
        return "".join(pieces)

    def cut(self, tokens: Iterable[Token]) -> None:
        """Drop tokens."""
        self.drop |= {token.i for token in tokens}

    def left_of(self, token: Token) -> bool:
        """Whether something of the subtree of a token is left, but for punctuation and function words."""
        return any(
            other.i not in self.drop and other.pos_ in ("NOUN", "PROPN", "VERB", "ADJ", "NUM") for other in token.subtree
        )


def noun_core(noun: Token) -> list[Token]:
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


def conjuncts(token: Token) -> list[Token]:
    """Return the conjuncts that depend on a token directly."""
    return [child for child in token.children if child.dep_ == "conj"]


def drop_from_list(edit: Edit, token: Token) -> bool:
    """Drop a member of a coordination with its conjunction. False if the token is in none."""
    followers = conjuncts(token)
    if token.dep_ == "conj":
        siblings = [t for t in token.head.children if t.dep_ == "cc" and t.i < token.i]
        before = max((t.i for t in siblings), default=None)
        if before is not None and not followers:
            edit.drop.add(before)
        return True
    if followers:
        edit.cut(t for t in token.children if t.dep_ == "cc" and t.i < followers[0].i)
        edit.cut(t for t in token.children if t.dep_ == "punct" and token.i < t.i < followers[0].i)
        return True
    return False


def drop_modifier(edit: Edit, token: Token) -> None:
    """Drop an adjective or another word before a noun, with its own adverbs and the comma of a list of adjectives."""
    edit.cut(t for t in token.subtree if t.i <= token.i or t.dep_ == "case")
    drop_from_list(edit, token)
    first = min(t.i for t in token.subtree)
    if first and edit.doc[first - 1].text == "," and token.i + 1 < len(edit.doc):
        following = edit.doc[token.i + 1]
        if following.pos_ in ("NOUN", "ADJ", "PROPN"):
            edit.drop.add(first - 1)
    elif token.i + 1 < len(edit.doc) and edit.doc[token.i + 1].text == "," and edit.doc[max(first - 1, 0)].pos_ in (
        "DET", "NUM", "PRON",
    ):  # fmt: skip
        edit.drop.add(token.i + 1)


def drop_rest(edit: Edit, token: Token) -> None:
    """Drop what follows a dropped noun or verb and makes no sense without it; keep places and people's actions."""
    for child in token.children:
        if child.i < token.i or child.i in edit.drop:
            continue
        if child.dep_ in ("prep", "agent", "dative", "prt"):
            if _is_place(child):
                continue
            edit.drop.add(child.i)
            for noun in child.children:
                if noun.dep_ in ("pobj", "pcomp"):
                    edit.cut(noun_core(noun))
                    edit.cut(t for other in conjuncts(noun) for t in other.subtree)
                    edit.cut(t for t in noun.children if t.dep_ == "cc")
                    drop_rest(edit, noun)
                else:
                    edit.cut(noun.subtree)
        elif child.dep_ in ("relcl", "amod", "advmod", "acomp", "appos", "oprd") or child.tag_ == "VBN":
            if not any(t.lower_ == "who" for t in child.children):
                edit.cut(child.subtree)


def _is_place(prep: Token) -> bool:
    """Whether a phrase tells where or when something is, other than on someone's body."""
    own = any(t.tag_ == "PRP$" or t.dep_ == "case" for t in prep.subtree)
    front = prep.lower_ in ("in", "next", "on") and not own
    return front or (prep.lower_ in PLACES and not own)


def drop_predicate(edit: Edit, verb: Token) -> None:
    """Drop a verb that has lost its object or complement, and of its clause what cannot stand without it."""
    helpers = ("aux", "auxpass", "neg", "prt", "advmod", "mark", "expl")
    parts = [verb, *(t for t in verb.children if t.dep_ in helpers and (t.i < verb.i or t.dep_ != "advmod"))]
    subject = next((t for t in verb.children if t.dep_ in ("nsubj", "nsubjpass")), None)
    relative = subject is not None and subject.tag_ in ("WDT", "WP")
    others = [t for t in conjuncts(verb) if t.pos_ in ("VERB", "AUX")]
    if verb.dep_ == "conj" and verb.head.pos_ in ("VERB", "AUX", "NOUN", "PROPN", "ADJ"):
        drop_from_list(edit, verb)
        edit.cut(verb.subtree if subject is not None and not relative else parts)
        drop_rest(edit, verb)
    elif others and not any(t.dep_ in ("nsubj", "nsubjpass") for t in others[0].children):
        edit.cut(parts)
        drop_from_list(edit, verb)
        if subject is None or others[0].tag_ not in ("VBG", "VBN") or verb.tag_ == others[0].tag_:
            edit.drop -= {t.i for t in verb.children if t.dep_ in ("aux", "auxpass", "mark") and verb.tag_ == others[0].tag_}
    elif subject is not None and not relative and verb.dep_ in ("advcl", "acl", "relcl", "ccomp", "parataxis", "pcomp"):
        edit.cut(verb.subtree)
        if verb.dep_ == "pcomp":
            edit.drop.add(verb.head.i)
    else:
        edit.cut(parts)
        if relative and subject is not None:
            edit.cut(subject.subtree)
        if verb.dep_ == "xcomp" and verb.head.lemma_ in ("appear", "seem", "look"):
            drop_predicate(edit, verb.head)
        if verb.dep_ == "pcomp":
            edit.drop.add(verb.head.i)
        drop_rest(edit, verb)


class StyleRules:
    """Drops a style: its phrase up to the word that it describes."""

    def __init__(self, edit: Edit):
        self.edit = edit

    def drop(self, name: Token) -> None:
        """Drop an artist's name, and upwards all that only leads to it."""
        edit, node = self.edit, name
        edit.cut(noun_core(name))
        while True:
            up = node.head
            if node.dep_ == "conj" and node is name:
                drop_from_list(edit, node)
                return
            if node is name and conjuncts(node) and node.dep_ in ("pobj", "poss", "dobj"):
                drop_from_list(edit, node)
                return
            if node.dep_ == "poss" or (node.dep_ in MODIFIERS and up.i > node.i):
                if up.lemma_.lower() not in STYLE_NOUNS:
                    if node.dep_ == "poss" and node.tag_ not in ("PRP$",):
                        edit.put[min(t.i for t in noun_core(node))] = "the"
                    return
                edit.cut(noun_core(up))
                edit.put.clear()
                node = up
            elif node.dep_ in ("pobj", "pcomp"):
                edit.drop.add(up.i)
                edit.cut(t for t in up.children if t.dep_ in ("advmod", "mark", "prep", "pcomp") and t.i < node.i)
                above = up.head
                if up.dep_ in ("pcomp", "prep") and above.pos_ in ("ADP", "SCONJ", "ADV"):
                    edit.drop.add(above.i)  # 'as if by'
                    above = above.head
                if above.pos_ in ("NOUN", "PRON", "PROPN") and (
                    above.lemma_.lower() in STYLE_NOUNS or above.lower_ in ("that", "those")
                ):
                    edit.cut(noun_core(above))
                    node = above
                elif above.pos_ in ("VERB", "ADJ", "AUX") or above.lemma_.lower() in LIKENESS:
                    self._predicate(above)
                    return
                else:
                    return
            elif node.dep_ in ("dobj", "attr", "oprd", "acomp"):
                self._predicate(up)
                return
            elif node.dep_ in ("nsubj", "nsubjpass"):
                edit.cut(up.subtree if up.dep_ in ("ROOT", "conj", "relcl", "advcl") else node.subtree)
                return
            elif node.dep_ == "acl" or node.dep_ == "relcl":
                return
            else:
                return

    def _predicate(self, word: Token) -> None:
        """Drop 'reminiscent', 'inspired' or 'painted', and the verb that goes with it."""
        edit = self.edit
        if word.pos_ == "ADJ" or word.lemma_.lower() in LIKENESS:
            edit.cut(t for t in word.subtree if t.i <= word.i and t.dep_ in ("advmod", "amod", "det") or t is word)
            if word.dep_ in ("acomp", "attr", "oprd") and word.head.pos_ in ("AUX", "VERB"):
                word = word.head
            else:
                return
        stays = [
            t for t in word.children
            if t.i > word.i and t.i not in edit.drop and t.dep_ in ("prep", "agent", "npadvmod", "oprd", "dobj", "conj")
        ]  # fmt: skip
        if word.lemma_ in MADE and word.tag_ == "VBN" and any(t.dep_ in ("prep", "agent") for t in stays):
            return
        if word.dep_ == "ROOT":
            subject = next((t for t in word.children if t.dep_ in ("nsubj", "nsubjpass")), None)
            if not stays and (subject is None or _says_little(subject)):
                edit.cut(word.subtree)
                return
        drop_predicate(edit, word)


def _says_little(noun: Token) -> bool:
    plain = [t for t in noun.subtree if t.pos_ in ("NOUN", "PROPN", "PRON", "NUM")]
    return all(t.lemma_.lower() in STYLE_NOUNS | DEPICTIONS or t.pos_ == "PRON" for t in plain)


class TermRules:
    """Drops a part or attribute of what is depicted, or puts a harmless noun in its place.

    Args:
        stand_in: the noun; '' drops the phrase in any case.
    """

    def __init__(self, edit: Edit, stand_in: str):
        self.edit, self.stand_in = edit, stand_in

    def drop(self, term: Token, words: list[Token]) -> None:
        """Drop a term of these words, of which `term` is the head."""
        edit, up = self.edit, term.head
        if term.pos_ in ("VERB", "AUX") and term.dep_ not in MODIFIERS and self._verb(term):
            return
        if term.dep_ in MODIFIERS and up.i > term.i and up not in words:
            edit.cut(words)
            drop_modifier(edit, term)
        elif term.pos_ in ("ADJ", "ADV") or term.tag_ == "VBN":
            self._adjective(term, words)
        else:
            edit.cut(words)
            self._noun(term)

    def _verb(self, term: Token) -> bool:
        """Replace an action by standing, or meeting if it has an object. False if it is a participle that describes."""
        edit = self.edit
        agent = any(t.dep_ == "agent" for t in term.children)
        if term.tag_ == "VBN" and not agent:
            return False
        forms = _MEET if agent or any(t.dep_ == "dobj" for t in term.children) else _STAND
        edit.put[term.i] = forms.get(term.tag_, forms["VBG"])
        return True

    def _adjective(self, term: Token, words: list[Token]) -> None:
        edit, up = self.edit, term.head
        edit.cut(words)
        edit.cut(t for t in term.children if t.dep_ in ("advmod", "npadvmod", "neg") and t.i < term.i)
        copula = up if up.lemma_ in ("be", "appear", "look", "seem", "remain") and up.pos_ in ("AUX", "VERB") else None
        helpers = [t for t in term.children if t.dep_ in ("auxpass", "aux", "cop")]
        if term.dep_ in ("acomp", "attr", "oprd") and copula is not None:
            if drop_from_list(edit, term):
                return
            drop_predicate(edit, copula)
        elif helpers:
            drop_predicate(edit, term)
        else:
            drop_from_list(edit, term)
            relative = [t for t in term.children if t.dep_ in ("nsubj", "nsubjpass") and t.tag_ in ("WDT", "WP")]
            edit.cut(relative)

    def _noun(self, term: Token) -> None:
        edit, up = self.edit, term.head
        core = noun_core(term)
        owner = next((t for t in term.children if t.dep_ == "poss"), None)
        if term.dep_ in ("nsubj", "nsubjpass", "ROOT", "attr"):
            self._subject(term, owner)
            return
        if term.dep_ == "conj" or (conjuncts(term) and term.dep_ in ("dobj", "pobj")):
            head = term.head if term.dep_ == "conj" else term
            if head.dep_ in ("nsubj", "nsubjpass", "ROOT"):
                self._stand_in(term)
                return
            edit.cut(core)
            drop_rest(edit, term)
            drop_from_list(edit, term)
        elif term.dep_ == "pobj":
            self._object_of_preposition(term, core)
        elif term.dep_ in ("dobj", "dative"):
            if up.lemma_ in HOLDS or up.tag_ in ("VBG", "VBN") and up.dep_ in ("acl", "advcl", "conj", "amod", "relcl"):
                edit.cut(core)
                drop_rest(edit, term)
                drop_predicate(edit, up)
            elif any(t.pos_ == "VERB" and not any(c.dep_ == "nsubj" for c in t.children) for t in conjuncts(up)):
                edit.cut(core)
                drop_rest(edit, term)
                drop_predicate(edit, up)
            else:
                self._stand_in(term)
        else:
            edit.cut(core)
            drop_rest(edit, term)
            drop_from_list(edit, term)

    def _object_of_preposition(self, term: Token, core: list[Token]) -> None:
        edit, prep = self.edit, term.head
        above = prep.head
        if prep.lower_ == "of" and above.lemma_.lower() in AMOUNTS and above.pos_ == "NOUN":
            edit.cut([prep, *core])
            edit.cut(noun_core(above))
            drop_rest(edit, term)
            self._noun(above)
            return
        if prep.lower_ == "of" and above.lemma_.lower() in DEPICTIONS:
            self._stand_in(term)
            return
        edit.cut([prep, *core])
        edit.cut(t for t in prep.children if t.dep_ in ("advmod", "prep") and t.i < term.i)
        drop_rest(edit, term)
        if above.tag_ == "VBN" and above.dep_ in ("acl", "amod", "advcl", "conj", "ROOT", "relcl", "acomp"):
            if not any(t.dep_ in ("prep", "agent", "dobj") and t.i not in edit.drop for t in above.children):
                drop_predicate(edit, above)

    def _subject(self, term: Token, owner: Token | None) -> None:
        edit, verb = self.edit, term.head
        finite = verb.tag_ in ("VBZ", "VBP", "VBD") or any(t.dep_ in ("aux", "auxpass") for t in verb.children)
        if term.dep_ in ("nsubj", "nsubjpass") and (not finite or (owner is not None and owner.pos_ == "PRON")):
            clauses = [t for t in verb.children if t.dep_ == "advcl" and any(c.dep_ == "nsubj" for c in t.children)]
            edit.cut(verb.subtree)
            if verb.dep_ == "ROOT" and clauses:
                edit.drop -= {t.i for t in clauses[0].subtree}
                edit.cut(t for t in clauses[0].children if t.dep_ == "mark")
            return
        self._stand_in(term)

    def _stand_in(self, term: Token) -> None:
        """Put the harmless noun in the place of a term; without one, drop what comes before the next noun phrase."""
        edit = self.edit
        many = term.tag_ in ("NNS", "NNPS")
        counted = many or any(t.dep_ in ("det", "poss", "nummod") for t in term.children)
        if self.stand_in and (counted or term.dep_ == "ROOT"):
            edit.drop.discard(term.i)
            edit.put[term.i] = plural(self.stand_in) if many else self.stand_in
            for child in term.children:
                if child.dep_ in LEFT and child.i < term.i and child.dep_ not in ("amod", "compound"):
                    edit.drop -= {t.i for t in child.subtree}
            return
        promote(edit, term)


def promote(edit: Edit, term: Token) -> None:
    """Drop a subject with its verb, up to the next noun phrase, which becomes the text."""
    edit.cut(noun_core(term))
    start = min(t.i for t in term.sent)
    for chunk in edit.doc.noun_chunks:
        if chunk.start > term.i and not any(t.i in edit.drop for t in chunk):
            edit.cut(edit.doc[start : chunk.start])
            return
    edit.cut(term.sent)
