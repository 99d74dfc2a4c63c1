"""Removes a concept from a caption and keeps the rest of its content.

'a deer in the style of noto on a red background' becomes 'an animal in the style of noto on a red background'; for the
style noto it becomes 'a deer on a red background'.

Approach: each sentence that mentions the concept goes through these steps.

1. Names and synonyms are replaced by `concept.replacement`, if there is one.
2. Every remaining term is dropped by an ordered list of regular expressions, together with the words that only lead to
   it: 'in the style of ...', 'holding a ...', 'who is ...'. The first rules match whole phrases of known shapes; the
   last one matches the bare term.
3. The text is tidied (doubled commas, empty brackets, dangling prepositions) and its articles are corrected.

Step 2 repeats, with the tidying, until the sentence no longer mentions the concept. A sentence without any content word
left is dropped.

Limits: the rules know a few hundred English function words and no grammar. An unusual sentence may come out clumsy or
lose a phrase that could have stayed, and a concept that is described without any of its terms is not found. What is
guaranteed is that the result contains no term of the concept. For more fluent captions, a refiner (endpoint.py) can
rewrite them before these rules are applied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.wording import ABBREVIATIONS, fix_articles, plural, straight_quotes, words_pattern

# Word classes ---------------------------------------------------------------------------------------------------------

_DET = (
    r"(?:an?|the|his|her|its|their|this|that|these|those|some|another|one|two|three|four|five|several|many|multiple|no)"
)
_PREP = (
    r"(?:of|in front of|on top of|next to|in|on|at|by|with|without|from|into|onto|inside|near|beside|behind|before"
    r"|above|below|under|over|around|against|among|amid|between|through|during|within|across|along|beneath|towards?|for|to"
    r"|like|after)"
)
_HOLDS = (
    r"(?:(?:hold|wield|carry|brandish|wear|show|featur|depict|display|contain|hav|us|includ|portray|sport|clutch|bear"
    r"|illustrat|present|reveal|aim|point|suggest|evok|rais|swing|lift|highlight|expos|emphasiz)ing"
    r"|(?:hold|wield|wear|show|feature|depict|display|contain|use|include|portray|sport|bear|illustrate|present|reveal"
    r"|suggest|evoke|raise|lift|highlight|expose|emphasize)s?|carries|carry|has|have)"
)
_BE = r"(?:is|are|was|were|being|appears?|appearing|looks?|seems?|remains?)(?: to be)?"
_PERSON = (
    r"(?:m[ae]n|wom[ae]n|persons?|people|figures?|girls?|boys?|couples?|models?|body|bodies|lady|ladies|he|she|they|it)"
)
_VERY = (
    r"(?:completely|fully|totally|partially|partly|entirely|mostly|nearly|almost|very|highly|extremely|strongly|clearly"
    r"|heavily|scantily|explicitly|quite|rather|both|all|also|still)"
)
_STOP = rf"(?:{_DET}|{_PREP}|{_HOLDS}|{_BE}|{_PERSON}|and|or|but|who|which|while|as)"
"""Words that cannot be adjectives."""
_ADJ = rf"(?:(?!{_STOP}(?![\w-]))[\w'-]+ ){{0,3}}"
"""Up to three adjectives. The bound limits backtracking."""
_NP = rf"(?:\b{_DET} {_ADJ})"
"""The start of a noun phrase: a determiner and adjectives."""
_VERB = (
    r"(?:(?!(?:draw|paint|render|build|cloth|even|morn|ceil|k|r|th|str|w|spr|engrav|etch|print)ings?\b"
    r"|(?:r|b|sh|se|hundr)ed\b)"
    r"\w+(?:ing|ed)|(?:stand|sit|lie|rest|run|walk|hang|look|face|fl[iy]e?|swim|stare|graze|leap|jump|emerge|rise|fill"
    r"|dominate|surround|cover|grow|float|move|gaze|wait|sleep|lay|serve|add|create|give|make)s?)"
)
_HEAD = (
    rf"(?=\s*(?:$|[,.;:!?)\"]|(?:{_PREP}|{_BE}|{_HOLDS}|and|or|but|who|which|that|while|as|can|may|will)\b"
    rf"|(?!(?:%s)\b){_VERB}\b))"
)
"""Lookahead: the word before this position is the head of its noun phrase. '%s' are nouns that look like verbs."""
_DOES = rf"(?:{_BE}|{_HOLDS}|{_VERB}|\w+[^\Wsu]s|\w+ly)"
"""A verb or an adverb, also by its ending alone."""

_STYLE = (
    r"(?:styles?|manners?|aesthetics?|techniques?|traditions?|spirit|vein|fashion|palettes?|looks?|brush ?work"
    r"|brush ?strokes?|approach|works?|art ?works?|art|paintings?|masterpieces?|hand|school|influences?|colou?rs)"
)
_MADE = (
    r"(?:done|painted|drawn|rendered|created|made|executed|designed|illustrated|depicted|presented|portrayed|composed"
    r"|styled|stylized)"
)
_ARTIST = r"(?:(?:(?:the|an?) )?(?:[\w-]+ )?(?:artist|painter|master|illustrator) )?"
_AFTER = (
    r"(?:inspired by|influenced by|reminiscent of|evocative of|characteristic of|typical of|associated with|known from"
    r"|similar to|akin to|attributed to|resembling|evoking|echoing|recalling|imitating|mimicking|emulating|resembles"
    r"|evokes|echoes|recalls|(?:in )?(?:an? )?(?:homage|tribute) to|à la|a la|by|after|like|from|of|as)"
)
_MANY = (
    r"(?:two|three|four|five|six|seven|eight|nine|ten|several|many|few|multiple|various|numerous|both|these|those"
    r"|dozens of|(?:herd|group|pair|pack|flock|row|collection|family|number|variety) of|\d+)"
)
_SENTENCE_GAP = re.compile(
    rf"(?:(?<=[^\W\d_]{{2}}[.!?]){ABBREVIATIONS}|(?<=[\")][.!?])|(?<=[^\W\d_]{{2}}[.!?][\")]))\s+(?=[\"'(]?[A-Z])"
)
_EMPTY_WORDS = """
    a an the this that these those it its it's he his she her they their there here some one is are was were be
    been being has have and or but of in on at by with without from as to for like into near image picture photo
    photograph painting paintings drawing illustration artwork art work style manner scene depiction rendering
    emoji draw shows showing depicts depicting features featuring made done painted drawn very highly detailed
"""
_NO_CONTENT = frozenset(_EMPTY_WORDS.split())
"""Words that give an image model nothing to draw."""


def refine(caption: str, concept: Concept) -> str:
    """Return the caption without any term of the concept; '' if nothing that could be drawn is left.

    Names and synonyms are replaced by `concept.replacement` if there is one; all other terms are dropped together with
    the words that only lead to them. A caption that does not mention the concept is returned unchanged, except for
    normalized white space and quotation marks. `Describe` checks the result again.
    """
    text = " ".join(straight_quotes(caption).split())
    if concept.mentions(text):
        rules = _rules(concept.kind, concept.names + concept.synonyms, concept.terms(), concept.replacement)
        sentences = _SENTENCE_GAP.split(text)
        text = " ".join(filter(None, (_refine_sentence(sentence, concept, rules) for sentence in sentences)))
    return text if _has_content(text) else ""


@dataclass(frozen=True)
class _Rules:
    """The compiled rules of one concept."""

    name: re.Pattern[str]
    """Names and synonyms; used only with a replacement."""
    compound: re.Pattern[str]
    """Compound adjectives with a name, such as 'knife-wielding'. They are dropped even if names are replaced."""
    singular: frozenset[str]
    """Names and synonyms in lower case, to tell singular from plural."""
    replacement: str
    drop: tuple[tuple[re.Pattern[str], str], ...]
    """Patterns and what replaces them, in the order in which they are applied."""


@lru_cache(maxsize=64)
def _rules(kind: str, names: tuple[str, ...], terms: tuple[str, ...], replacement: str) -> _Rules:
    """Compile the rules of a concept. Cached, because compiling takes about 0.1 s."""
    is_name = re.compile(words_pattern(names), re.IGNORECASE)
    names = tuple(term for term in terms if is_name.search(term))  # also 'dump truck' if 'truck' is a name
    name = words_pattern(names)
    # one term with a hyphenated prefix or suffix, quotation marks, a possessive, a reflexive pronoun
    one = rf"(?:\"?(?:\b(?:\w+-)+)?{words_pattern(terms)}(?:-\w[\w-]*)?\"?(?:'s\b|')?(?: (?:him|her|it|them)self)?)"
    # one term or a list of terms
    t = rf"(?:{one}(?:(?:\s?[,&/]|\s(?:and|or|by))?\s(?:{_DET}\s)?{one})*)"
    verbs_not = "|".join(map(re.escape, (replacement, plural(replacement)))) if replacement else "-"
    head = _HEAD % verbs_not
    made = rf"(?:{_MADE} )?"
    work = rf"(?:(?<=s) {_ADJ}{_STYLE}|(?<=s) \"[^\"]{{1,60}}\"| {_STYLE})?"
    in_style_of = rf"{_NP}?{_ADJ}{_STYLE}(?: and {_STYLE})? (?:of|by|from) {_ARTIST}{t}{work}"
    by_artist = rf"{_AFTER} {_NP}?{_ADJ}(?:{_STYLE} (?:of|by) )?{_ARTIST}{t}{work}{head}"
    of_work = rf"(?:{_STYLE}|composition|image|picture|scene)(?: of [\w ]{{1,40}})?"
    subject = rf"(?:it|(?:the|its|this|these) (?:[\w-]+ ){{0,4}}{of_work})"
    style_rules = [
        # 'in the style of Picasso and Rembrandt' -> 'in the style of Rembrandt'
        (rf"\b(style of|of|by|like|after) {t},? (?:and|or|&) (?=(?-i:[A-Z])|[\w-]+(?:$|[.,;]| on\b| in\b))", r"\1 "),
        # a whole sentence: 'The colors are reminiscent of Van Gogh.'
        (rf"^{subject} (?:{_BE} )?(?:{_VERY} )?{made}{_AFTER} [^,;]{{0,80}}{t}[^,;]{{0,40}}$", ""),
        # 'in the (bold) style of (the painter) Van Gogh', 'with the brushwork of ...'
        *_aside(rf"{made}(?:in|with|using|following) {in_style_of}"),
        # 'in Van Gogh style', 'in a Picasso-inspired manner', "with Picasso's bold palette"
        *_aside(rf"{made}(?:in|with|using) {_NP}?{_ADJ}{t} {_ADJ}{_STYLE}\b"),
        # 'as Van Gogh would have painted it'
        *_aside(rf"(?:(?:as(?: if)?|that|which) )?{t} (?:(?:would|might|could) )?(?:have )?{_MADE}(?: it| them)?\b"),
        # '(is) painted by', 'inspired by the works of', "reminiscent of Van Gogh's swirling style"
        *_aside(rf"(?:(?:that|which) )?(?:{_BE} )?(?:{_VERY} )?{made}(?:as (?:if|though) )?{made}{by_artist}"),
        # 'a black silhouette of a deer'
        (rf"(?:\b(?:an?|the) {_ADJ})?{t}(?: (?:emoji|icon|sticker))? of ", ""),
        # 'deer, noto style, blue background'
        (rf"(?:^|,\s*|(?<=\()){t} {_STYLE}{head}", ""),
        # "Picasso's portrait"
        (rf"(?:\b(?:an?|the) )?{t}(?:(?<='s)|(?<=s')) (?=\w)", "the "),
    ]  # fmt: skip
    leads = rf"(?:{_PREP}|{_HOLDS})"
    ends = rf"{_DET}|{leads}|and|or|but|who|which|while|as"
    styled = r"(?: in the style of [\w-]+)?"
    bared = r"(?: (?:exposed|visible|showing|bare|uncovered|open|raised|spread)\b)?"
    drop_rules = [
        # a sentence about the concept: 'The knife is bloody.'
        (rf"^{_NP}?{t} {_BE} (?:[\w-]+ ){{0,2}}[\w-]+[.!?]?$", ""),
        # ', blood on their faces,'
        (rf",\s*(?:and )?{_NP}?{t} (?:on|from|over|across) (?:his|her|its|their|the) [\w ]{{1,40}}(?=[,.;]|$)", ""),
        # '"The Night Watch", by Rembrandt, shows'
        (rf",\s*{t},(?= (?:{_HOLDS}|{_BE})\b)", ""),
        # a member of a list: '..., a knife', 'a knife, a bomb and a cat', 'a knife and fork', 'a nude, smiling woman'
        (rf",?\s*\b{leads} {_NP}?{_ADJ}{t}(?=, and )", ""),
        (rf",\s*(?:(?:and|or) )?{_NP}?{t}(?=\s*(?:,|and\b|or\b|$|[.;!?)]))", ""),
        (rf"\b(an?|the) {t}, (?!(?:{ends}|{_BE})\b)(?=[\w-]+ (?!(?:{ends})\b)\w)", r"\1 "),
        (rf"\b({_HOLDS}|with) {_ADJ}{t},? (?:and|or|&) ", r"\1 "),
        (rf"{t},? (?:and|or|&) (?=(?!{_DET}\b)\w)", ""),
        (rf"{_NP}?{t}(?:,? (?:and|or|&)|,) (?={_DET}\b)", ""),
        (rf",? (?:and|or|&) {_NP}?{t}{head}", ""),
        # the subject with its verb: 'There is a deer standing in a meadow' -> 'a meadow'
        (rf"^(?:there (?:is|are) )?{_NP}?{t}{styled}{head}(?: {_DOES}){{0,2}}(?: {_PREP})?(?= \w)", ""),
        (rf"^(?:there is )?\b(?:an?|the) {_ADJ}{t} \w+[^\Wsu]s\b(?: {_PREP})?(?= \w)", ""),
        # a phrase that only leads to the concept: 'holding a big knife', 'with her breasts exposed', 'who is naked'
        (rf",?\s*\b{leads} {_NP}?{_ADJ}{t}{bared}{head}", ""),
        (rf",?\s*\b{leads} an? {_ADJ}{t}(?= \w+[^\Wsu]s\b)", ""),
        (rf",?\s*\b(?:(?:who|that|which) )?{_BE} (?:{_VERY} )?{_NP}?{_ADJ}{t}{head}", ""),
        (rf"{_NP}{t}{head}", ""),
        # an adjective: 'a smiling, nude woman', 'a completely nude woman'
        (rf",\s*(?:{_VERY} )?{t} (?!(?:{_DET}|{_PREP}|{_HOLDS}|{_BE}|and|or|who)\b)(?=\w)", " "),
        (rf"(?:\b{_VERY} )?{t}", ""),
    ]  # fmt: skip
    rules = (style_rules if kind == "style" else []) + drop_rules
    return _Rules(
        name=re.compile(rf"(?:\b(?:\w+-)+)?(?P<term>{name})", re.IGNORECASE),
        compound=re.compile(rf"{name}-(?:\w+ing|like|style|styled|inspired|shaped|esque|themed)\b ?", re.IGNORECASE),
        singular=frozenset(name.lower() for name in names),
        replacement=replacement,
        drop=tuple((re.compile(pattern, re.IGNORECASE), kept) for pattern, kept in rules),
    )


def _aside(phrase: str) -> list[tuple[str, str]]:
    """Return rules that drop a phrase with the comma before it, and with the comma after it if a verb follows."""
    verb = rf"(?= (?:{_HOLDS}|{_BE}|{_VERB})\b)"
    return [(rf",\s*\b{phrase},{verb}", ""), (rf",?\s*\b{phrase}", "")]


def _refine_sentence(sentence: str, concept: Concept, rules: _Rules) -> str:
    if not concept.mentions(sentence):
        return sentence
    text = _replace(sentence, rules) if rules.replacement else sentence
    while concept.mentions(text):  # dropping words can join others into a term
        for pattern, kept in rules.drop:
            text = " ".join(pattern.sub(kept, text).split())
        text = _tidy(text)
    text = fix_articles(_tidy(text))
    if not _has_content(text):
        return ""
    return text[0].upper() + text[1:] if sentence.lstrip("\"'(")[:1].isupper() else text


def _replace(text: str, rules: _Rules) -> str:
    """Replace names and synonyms by the concept's replacement, in the same number and letter case."""
    one, many = rules.replacement, plural(rules.replacement)

    def noun_for(match: re.Match[str]) -> str:
        word, before, after = match["term"], text[: match.start()], text[match.end() :]
        is_plural = re.sub(r"[\s_-]+", " ", word.lower()) not in rules.singular and word.lower() not in rules.singular
        if plural(word) == word:  # 'deer': the number shows in the words around it, 'two deer' or 'the deer are'
            is_plural = bool(re.search(rf"\b{_MANY} (?:[\w-]+ ){{0,2}}$", before, re.IGNORECASE))
            is_plural = is_plural or bool(re.match(r" (?:are|were|have|graze|stand|run|gather)\b", after))
        noun = many if is_plural else one
        return noun[0].upper() + noun[1:] if match.group()[0].isupper() and not before.strip(" \"'(") else noun

    text = rules.compound.sub("", text)
    text = rules.name.sub(noun_for, text)
    # merge repetitions: 'a knife, a dagger and an axe' has become 'a thing, a thing and a thing'
    either = rf"(?:{re.escape(many)}|{re.escape(one)})\b"
    text = re.sub(rf"\b({either})(?: {either})+", r"\1", text, flags=re.IGNORECASE)
    item = rf"(?:(?:an?|the|some) )?{either}"
    return re.sub(rf"\b({item})(?:,? (?:and |or )?{item})+", r"\1", text, flags=re.IGNORECASE)


_TAIL = rf"(?:and|or|with|of|by|like|from|as|for|at|in|an?|the|{_BE}|(?:featur|show|depict|evok|resembl)ing)"
_TIDY = tuple(
    (re.compile(pattern, re.IGNORECASE), kept)
    for pattern, kept in (
        (r"\(\W*\)|\[\W*\]|\"\W*\"|(?<!\w)'\s*'(?!\w)", ""),
        (r"\s+(?=[,.;:!?)])", ""),
        (r"(?<=[(\[])\s+", ""),
        (r"\b(an?|the),\s*", r"\1 "),
        (
            r"\b(?:an?|the) (?=(?:an?|the|his|her|its|their|this|these|of|in|on|at|by|with|from|and|or|next to) )",
            "",
        ),
        (r"([,;])(?:\s*[,;:])+", r"\1"),
        (r",\s*(?:and|or)\s*,", ","),
        (rf"\b(and|or|{_PREP}) (?:and|or)\b", r"\1"),
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


def _has_content(text: str) -> bool:
    """Return whether the text contains a word that an image model could draw."""
    return any(word not in _NO_CONTENT for word in re.findall(r"[^\W\d_][\w'-]*", text.lower()))
