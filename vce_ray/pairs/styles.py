"""Which words of a parsed sentence to drop so that it no longer names a style or an artist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vce_ray.concepts.wording import word_set
from vce_ray.pairs.edits import Edit, drop_clause, drop_from_list, drop_predicate, is_segment, starts_list
from vce_ray.pairs.phrases import COPULAS, DEPICTIONS, FINITE, MODIFIERS, core, followed_by, lead

if TYPE_CHECKING:
    from spacy.tokens import Token

STYLE_NOUNS = word_set(
    """style manner aesthetic technique tradition spirit vein fashion palette look brushwork brushstroke approach work
    artwork art masterpiece hand school influence essence resemblance similarity homage nod tribute take reference
    hint echo period series oeuvre signature repetition chiaroscuro impasto feel touch flair genre language idiom
    lens version method lighting effect quality reminder imitation silkscreen quote allusion year career"""
)
"""Nouns that lead to an artist: 'the brushwork of'."""
_WORKS = word_set("work artwork art masterpiece reference take")
"""Those of them that stay where the artist is only named before them: 'a cubist artwork'."""
_VAGUE = word_set("""color colour contrast light shadow line stroke tone shape composition use brush form""")
_ARTISTS = word_set("artist painter master illustrator printmaker sculptor")
_MADE = word_set(
    """do paint draw render create make execute design illustrate depict present portray compose style stylize print
    craft produce inspire influence attribute base model set"""
)
_LIKENESS = word_set("""reminiscent evocative characteristic typical similar akin reflective indicative suggestive""")
_LIKE = word_set("like resemble mimic imitate echo evoke recall emulate")


class StyleRules:
    """Drops a style: its phrase up to the word that it describes."""

    def __init__(self, edit: Edit):
        self.edit = edit

    def drop(self, words: Sequence[Token]) -> None:
        """Drop the name of a style or artist, and upwards all that only leads to it."""
        edit = self.edit
        node = next((t for t in words if t.head not in words), words[-1])
        edit.cut(words)
        edit.cut(t for word in words for t in word.children if t.dep_ == "case" or t.lower_ in ("himself", "herself"))
        if self._as_painted(words[-1]) or starts_list(edit, words) or is_segment(edit, words, STYLE_NOUNS):
            return None
        others = [t for t in node.conjuncts if t.i not in edit.drop and t.pos_ in ("PROPN", "NOUN")]
        if node.dep_ == "conj" or (others and node.dep_ in ("pobj", "poss", "dobj")):
            return drop_from_list(edit, node)
        if not (node.dep_ in MODIFIERS and node.head.i > node.i):
            edit.cut(core(node))
        phrase, link = lead(words[0])
        acts = node.dep_ == "nsubj" and node.head.tag_ in FINITE  # 'in the way Picasso drew'
        if link is not None and link.pos_ == "ADP" and not acts and node.dep_ not in ("pobj", "poss", *MODIFIERS):
            edit.cut([link, *phrase])
            return self._climb(link)
        if link is not None and link.lemma_ in _LIKE and link.tag_ == "VBG":  # 'an artist resembling Picasso'
            edit.cut(edit.doc[link.i : words[0].i])
            return None
        return self._climb(node, words)

    def _climb(self, node: Token, words: Sequence[Token] = ()) -> None:
        """Drop what leads to a dropped node."""
        edit = self.edit
        while True:
            up = node.head
            if node.dep_ == "appos" and up.lemma_.lower() in _ARTISTS:
                edit.cut(core(up))
                node = up
            elif node.dep_ == "poss" or (node.dep_ in MODIFIERS and up.i > node.i):
                modifies = node.dep_ != "poss" and (up.lemma_.lower() in _WORKS or up.dep_ in ("nsubj", "nsubjpass"))
                if up.lemma_.lower() not in STYLE_NOUNS or modifies:
                    if node.dep_ == "poss":
                        edit.put[min(t.i for t in (*words, *core(node)))] = "the"
                    return None
                edit.cut(core(up))
                node = up
            elif node.dep_ in ("pobj", "pcomp", "prep") and up.pos_ in ("ADP", "SCONJ", "ADV", "ADJ"):
                if (
                    node.dep_ == "pobj"
                    and up.lower_ == "with"
                    and (joined := followed_by(words[-1] if node in words else node))
                ):
                    return edit.drop.add(joined.i)
                edit.drop.add(up.i)
                edit.cut(t for t in up.children if t.i < node.i and t.dep_ in ("advmod", "mark", "prep"))
                if up.lemma_.lower() in _LIKENESS:
                    return self._likeness(up)
                node = up
            elif node.dep_ in ("prep", "agent") and up.lemma_.lower() in STYLE_NOUNS | {"that", "those"}:
                edit.cut(core(up))
                node = up
            elif node.dep_ in ("prep", "agent") and up.lemma_.lower() in DEPICTIONS and _is_compared(up):
                edit.cut(core(up))  # 'similar to the famous drawing by'
                node = up
            elif node.dep_ in ("prep", "agent"):
                return self._above(up)
            elif node.dep_ in ("dobj", "attr", "oprd", "acomp"):
                if up.tag_ in ("VBG", "VBN") or not any(t.dep_ == "dobj" and t.i not in edit.drop for t in up.children):
                    self._predicate(up)
                return None
            elif node.dep_ in ("nsubj", "nsubjpass") and up.pos_ in ("VERB", "AUX"):
                return self._subject(up)
            else:
                return None

    def _as_painted(self, name: Token) -> bool:
        """Drop 'as ... would have painted it' around a name, whatever its parse; False if it is not there."""
        doc, edit = name.doc, self.edit
        first = next((t for t in reversed(doc[name.sent.start : name.i]) if t.i not in edit.drop), None)
        index = name.i + 1
        while index < len(doc) and (doc[index].tag_ == "MD" or doc[index].lower_ == "have"):
            index += 1
        if first is None or first.lower_ not in ("as", "that", "which", "if") or index == name.i + 1:
            return False
        while index < len(doc) and (doc[index].pos_ == "VERB" or doc[index].lower_ in ("it", "them", "this")):
            index += 1
        edit.cut(doc[first.i : index])
        return True

    def _subject(self, verb: Token) -> None:
        """Drop a clause about the artist; of 'Picasso painted this bull' the bull stays."""
        work = next((t for t in verb.children if t.dep_ == "dobj"), None)
        if verb.dep_ == "ROOT" and verb.lemma_ in _MADE and work is not None:
            self.edit.cut(verb.doc[verb.sent.start : min(t.i for t in core(work))])
        elif verb.dep_ == "ROOT":
            drop_clause(self.edit, verb)
        else:
            self.edit.cut(verb.subtree)
            if verb.dep_ == "relcl":
                self._bare_style(verb.head)

    def _above(self, up: Token) -> None:
        """Drop what a prepositional phrase that names the style hangs on, if it says only that: 'painted in'."""
        edit = self.edit
        bare = up.dep_ in ("acl", "advcl") and not edit.has_left(t for t in up.subtree if t.i > up.i)
        made = up.tag_ == "VBN" and (up.lemma_ in _MADE or bare)
        says_like = up.lemma_ in _LIKE or (up.lemma_ in COPULAS and up.pos_ in ("AUX", "VERB"))
        tribute = next((t for t in up.children if t.dep_ == "dobj" and t.lemma_.lower() in STYLE_NOUNS), None)
        if up.lemma_.lower() in _LIKENESS:
            self._likeness(up)
        elif tribute is not None and up.pos_ == "VERB":  # 'pays homage to'
            edit.cut(core(tribute))
            self._predicate(up)
        elif made or says_like:
            self._predicate(up)

    def _likeness(self, word: Token) -> None:
        """Drop 'strongly reminiscent', and 'is' if it is a predicate."""
        edit = self.edit
        edit.drop.add(word.i)
        edit.cut(t for prep in word.children for t in prep.subtree if _in_style(prep))
        near = {t.i for t in word.children if t.dep_ in ("advmod", "amod", "det")}
        for token in reversed(word.doc[word.sent.start : word.i]):
            if token.i not in near:
                break
            edit.drop.add(token.i)
        if word.dep_ in ("acomp", "attr", "oprd") and word.head.pos_ in ("AUX", "VERB"):
            self._predicate(word.head)
        else:
            self._bare_style(word.head)

    def _bare_style(self, noun: Token) -> None:
        """Drop a style of which nothing is told any more: 'in a style (reminiscent of Picasso)'."""
        apposed = noun.dep_ == "appos" and noun.lemma_.lower() in STYLE_NOUNS  # ', a technique (of Picasso)'
        if apposed or (
            noun.lemma_.lower() in ("style", "manner", "fashion", "way")
            and not any(
                t.dep_ in ("amod", "compound", "relcl", "acl") and t.i not in self.edit.drop for t in noun.children
            )
        ):
            self.edit.cut(core(noun))
            self._climb(noun)

    def _predicate(self, verb: Token) -> None:
        """Drop a verb that has lost what names the style, or its whole clause if nothing else is said in it."""
        edit = self.edit
        subject = next((t for t in verb.children if t.dep_ in ("nsubj", "nsubjpass")), None)
        after = next((t for t in verb.doc[verb.i + 1 : verb.sent.end] if t.i not in edit.drop), None)
        if verb.tag_ == "VBN" and after is not None and after.head == verb and after.dep_ in ("prep", "agent"):
            return  # 'painted (in the style of ...) with thick strokes'
        if subject is None or subject.tag_ in ("WDT", "WP") or verb.tag_ in ("VBG",) or verb.dep_ == "conj":
            drop_predicate(edit, verb)
            return self._bare_style(verb.head) if verb.dep_ in ("relcl", "acl") else None
        rest = [t for t in verb.subtree if t.i > verb.i]
        clauses = [
            t for t in verb.children if t.dep_ in ("advcl", "ccomp", "parataxis", "conj") and t.i not in edit.drop
        ]
        standing = any(c.dep_ == "nsubj" for t in clauses for c in t.children)
        if verb.dep_ in ("advcl", "ccomp") and verb.head.lemma_ in COPULAS and _says_little(subject):
            edit.cut(verb.subtree)  # 'looks like it was made by'
            return self._predicate(verb.head)
        if _says_little(subject) and (standing or not edit.has_left(rest)):
            return drop_clause(edit, verb)
        return drop_predicate(edit, verb)


def _in_style(prep: Token) -> bool:
    """Whether a phrase is 'in style' or the like, after 'similar'."""
    return prep.lower_ == "in" and any(t.dep_ == "pobj" and t.lemma_.lower() in STYLE_NOUNS for t in prep.children)


def _is_compared(noun: Token) -> bool:
    before = noun.doc[noun.head.i - 1].lower_ if noun.head.i else ""
    return noun.dep_ == "pobj" and (noun.head.lower_ in ("to", "like") or (before, noun.head.lower_) == ("as", "in"))


def _says_little(subject: Token) -> bool:
    nouns = [t for t in subject.subtree if t.pos_ in ("NOUN", "PROPN", "NUM")]
    return all(t.lemma_.lower() in STYLE_NOUNS | DEPICTIONS | _VAGUE for t in nouns)
