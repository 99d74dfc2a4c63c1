"""Removes a concept from a caption and keeps the rest of its content.

'a deer in the style of noto on a red background' becomes 'an animal in the style of noto on a red background'; for the
style noto it becomes 'a deer on a red background'.

Each sentence that mentions the concept goes through these steps:

1. Names and synonyms are replaced by `concept.replacement`, in singular or plural, if there is one.
2. Other terms are dropped one after the other, with the words that only lead to them, by rules over a parse of the
   sentence (terms.py, styles.py). A term that the sentence needs, such as its subject, becomes `concept.stand_in`.
3. The text is tidied: doubled commas, empty brackets, articles.
4. A sentence without content is dropped, and so is one that is not grammatical any more (grammar.py), if others remain.

What is guaranteed is that the result contains no term of the concept. Whether it is grammatical is for the caller to
check (grammar.fault). A concept that is described without any of its terms is not found. For more fluent captions, a
refiner (endpoint.py) can rewrite them before these rules are applied.
"""

from __future__ import annotations

import re
import unicodedata

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.language import can_be_verb, parse
from vce_ray.concepts.matching import Match
from vce_ray.concepts.wording import fix_articles, plural, sentences, straight_quotes
from vce_ray.pairs.edits import Edit
from vce_ray.pairs.grammar import content_words, fault, has_content
from vce_ray.pairs.phrases import is_hidden_verb
from vce_ray.pairs.styles import StyleRules
from vce_ray.pairs.terms import TermRules

MAX_STEPS = 40
"""Terms that are dropped from one sentence by its parse. Any that are left are cut out bare."""
_ARTIST = "Smith"
"""Stands for an artist's name in the parse, which knows it better than 'van Gogh', '梵高' or a misspelt name."""
_MANY = re.compile(
    r"\b(?:two|three|four|five|six|seven|eight|nine|ten|several|many|few|multiple|various|numerous|both|these|those|\d+"
    r"|(?:dozens|herd|group|pair|pack|flock|row|litter|collection|family|number) of) (?:[\w-]+ ){0,2}$",
    re.IGNORECASE,
)
_COMPOUND = re.compile(r"(?:\w+-)*$"), re.compile(r"(?:-\w+)+")
"""Hyphenated words around a term: 'half-', '-inspired'."""


def refine(caption: str, concept: Concept) -> str:
    """Return the caption without any term of the concept; '' if nothing that could be drawn is left.

    A caption that does not mention the concept is returned unchanged, except for white space, quotation marks and
    compatibility characters, such as full-width letters.
    """
    text = " ".join(straight_quotes(unicodedata.normalize("NFKC", caption)).split())
    if not concept.mentions(text):
        return text if has_content(text) else ""
    refined = [_refine_sentence(sentence, concept) for sentence in sentences(text)]
    kept = [sentence for sentence in refined if sentence and not fault(sentence)] or [max(refined, key=len, default="")]
    text = " ".join(kept)
    while match := next(iter(concept.matches(text)), None):  # words of two sentences can join into a term
        text = _tidy(_bare(text, match))
    return text if has_content(text) else ""


def is_gutted(caption: str, refined: str) -> bool:
    """Return whether a refined caption has lost so much that the rules are likely to have misread the caption.

    That is the case if a caption of at least six words with content has kept less than a third of them.
    """
    before, after = content_words(caption), content_words(refined)
    return len(before) >= 6 and 3 * len(before & after) < len(before)


def _refine_sentence(sentence: str, concept: Concept) -> str:
    if not concept.mentions(sentence):
        return sentence
    text = _replace(sentence, concept) if concept.replacement else sentence
    for step in range(len(text)):
        found = concept.matches(text)
        if not found:
            break
        text = _tidy(_without(text, found, concept) if step < MAX_STEPS else _bare(text, found[0]))
    text = fix_articles(_tidy(text))
    if not has_content(text):
        return ""
    return text[0].upper() + text[1:] if sentence.lstrip("\"'(")[:1].isupper() else text


def _bare(text: str, match: Match) -> str:
    return text[: match.start] + text[match.end :]


def _without(text: str, found: list[Match], concept: Concept) -> str:
    """Return the text with the first of its terms dropped."""
    first = found[0]
    if shorter := _without_compound(text, first):
        return shorter
    places = _names(text, found) if concept.kind == "style" else [(first.start, first.end)]
    start, end = places[0]
    originals: dict[int, str] = {}
    """Names by where the parsed text has another one in their place."""
    if concept.kind == "style" and (first.named or text[start:end].istitle()):
        text, originals = _with_plain_names(text, places)
        end = start + len(_ARTIST)
    doc = parse(text)
    span = doc.char_span(start, end, alignment_mode="expand")
    if span is None:
        return text[:start] + text[end:]
    edit = Edit(doc)
    if concept.kind == "style":
        StyleRules(edit).drop(list(span))
    else:
        parts = concept.kind == "object"
        TermRules(edit, concept.stand_in, concept.replacement, parts).drop(list(span))
    if all(token.i not in edit.drop and token.i not in edit.put for token in span):
        edit.cut(span)
    names = {token.i: originals[token.idx] for token in doc if token.idx in originals}
    edit.put = {i: name for i, name in names.items() if i not in edit.drop} | edit.put
    return edit.text()


def _with_plain_names(text: str, places: list[tuple[int, int]]) -> tuple[str, dict[int, str]]:
    """Return the text with _ARTIST at each of the places, and what was there by where it now is."""
    originals: dict[int, str] = {}
    shift = 0
    for begin, stop in places:
        originals[begin + shift] = text[begin + shift : stop + shift]
        text = text[: begin + shift] + _ARTIST + text[stop + shift :]
        shift += len(_ARTIST) - (stop - begin)
    return text, originals


def _names(text: str, found: list[Match]) -> list[tuple[int, int]]:
    """Return where a style is named, an artist and the title of a work as one: 'Picasso's "Guernica"'."""
    places: list[tuple[int, int]] = []
    for match in found:
        within = bool(places) and match.start < places[-1][1]  # the title in quotation marks after an artist
        if within or not (match.named or text[match.start].isupper()):
            continue
        start, end = match.start, match.end
        if places and re.fullmatch(r"(?:'s)?,? \"?(?:by |, )?\"?|\"? by ", text[places[-1][1] : start]):
            start = places.pop()[0]
        if title := re.match(r"'s (\"[^\"]{1,60}\")", text[end:]):
            end += title.end()
        if text[start:end].count('"') % 2:
            if text[start - 1 : start] == '"':
                start -= 1
            elif closing := re.match(r'[,.]?"', text[end:]):
                end += closing.end()
        places.append((start, end))
    return places or [(found[0].start, found[0].end)]


def _without_compound(text: str, match: Match) -> str:
    """Drop a term that is part of a hyphenated adjective, such as 'Van Gogh-inspired'; '' if it is not."""
    before, after = _COMPOUND[0].search(text[: match.start]), _COMPOUND[1].match(text, match.end)
    if after is None:
        return ""
    left, right = text[: before.start() if before else match.start], text[after.end() :]
    if left.endswith(", ") and re.match(r" \w", right):
        left = left[:-2]
    elif re.match(r", \w", right) and re.search(r"\b(?:an?|the) $", left):
        right = right[1:]
    return f"{left} {right}"


def _replace(text: str, concept: Concept) -> str:
    """Replace names and synonyms by the concept's replacement, in the same number and letter case."""
    one, many = concept.replacement, plural(concept.replacement)
    names = frozenset(concept.names + concept.synonyms)
    begun = len(text)
    for match in reversed([match for match in concept.matches(text) if match.term in names]):
        after = _COMPOUND[1].match(text, match.end)
        if match.end > begun or after or _is_action(text, match, concept):
            continue
        before = _COMPOUND[0].search(text[: match.start])
        begun = start = before.start() if before else match.start
        noun = many if match.plural or _is_plural(text, match) else one
        noun = noun.capitalize() if text[match.start].isupper() and not text[:start].strip(" \"'(") else noun
        text = text[:start] + noun + text[match.end :]
    return _merge(text, one, many)


def _is_action(text: str, match: Match, concept: Concept) -> bool:
    """Whether a term of an explicit concept is a verb or describes a noun ('battle scene'), which no noun replaces."""
    if concept.kind != "explicit":
        return False
    span = parse(text).char_span(match.start, match.end, alignment_mode="expand")
    if span is None:
        return False
    token, after = span.root, text[match.end : match.end + 1]
    describes = token.dep_ in ("compound", "amod") and token.head.i > token.i and not is_hidden_verb(token.head)
    acts = token.pos_ == "VERB" and token.i > token.sent.start
    return acts or (describes and after == " ") or is_hidden_verb(token)


def _is_plural(text: str, match: Match) -> bool:
    """Whether a noun whose plural is like its singular ('deer') is one: that shows in the words around it."""
    if plural(match.term) != match.term:
        return False
    if _MANY.search(text[: match.start]):
        return True
    span = parse(text).char_span(match.start, match.end, alignment_mode="expand")
    if span is None or any(child.dep_ in ("det", "poss") and child.lower_ != "the" for child in span.root.children):
        return False
    token = span.root
    after = "".join(word.lower_ for word in token.doc[span.end : span.end + 1])
    agrees = token.dep_ in ("nsubj", "nsubjpass") and token.head.tag_ in ("VBP", "VB")
    bare = span.start == token.sent.start and not after.endswith("s") and can_be_verb(after)  # 'Elk graze in a valley.'
    return agrees or bare or bool(re.match(r" (?:are|were|have)\b", text[match.end :]))


def _merge(text: str, one: str, many: str) -> str:
    """Merge repetitions: 'a knife, a dagger and an axe' has become 'a thing, a thing and a thing'."""
    either = rf"(?:{re.escape(many)}|{re.escape(one)})\b"
    text = re.sub(rf"\b({either})(?: {either})+", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(rf" \((?:an? |the )?(?:\w+ )?{either}\)", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"\b(?:an?|the) {re.escape(one)} and (?:his|her|its) {either}", many, text, flags=re.IGNORECASE)
    item = rf"(?:(?:an?|the|some) )?{either}"
    pattern = re.compile(rf"\b(?P<first>{item})(?:,? (?:and |or )?{item})+", re.IGNORECASE)

    def merged(match: re.Match[str]) -> str:
        words = [token for token in parse(text) if token.idx >= match.end()][:1]
        if (words and words[0].tag_ == "VBP") or (words and words[0].lower_ in ("are", "were", "have")):
            return many
        return match["first"]

    return pattern.sub(merged, text)


_TAIL = r"(?:and|or|with|of|by|like|from|as|for|at|in|an?|the|is|are|was|were|featuring|showing|depicting|resembling)"
_TIDY = tuple(
    (re.compile(pattern, re.IGNORECASE), kept)
    for pattern, kept in (
        (r"\(\W*\)|\[\W*\]|\"\W*\"|(?<!\w)'\s*'(?!\w)", ""),
        (r"\s+(?=[,.;:!?)])", ""),
        (r"(?<=[(\[])\s+", ""),
        (r"\b(an?|the),\s*", r"\1 "),
        (r"\b(?:an?|the) (?=(?:an?|the|his|her|its|their|this|these|and|or|of|in|on|with|from|is|are)\b)", ""),
        (r"([,;])(?:\s*[,;:])+", r"\1"),
        (r",\s*(?:and|or)\s*,", ","),
        (r"\b(and|or|of|with|in|by|from) (?:and|or)\b", r"\1"),
        (rf"[,;:]?\s+\b{_TAIL}(?=\s*(?:[,.;!?)]|$))", ""),
        (r"[,;:]\s*(?=[.!?)]|$)", ""),
        (r"([.!?])(?:\s*[.,;])+", r"\1"),
        (r"^(?:\W|_)+|^(?:and|or|but|by|of|with)\b\s*", ""),
        (r"\s+", " "),
    )
)


def _tidy(text: str) -> str:
    """Remove what dropped words leave behind: doubled commas, empty brackets, dangling function words."""
    before = None
    while text != before:
        before = text
        if text.count('"') % 2:
            text = text.replace('"', "")
        for pattern, kept in _TIDY:
            text = pattern.sub(kept, text).strip()
    return text
