"""Takes a concept out of a caption and leaves a sentence of the same content without it.

'a deer in the style of noto on a red background' becomes 'an animal in the style of noto on a red background';
for the style noto it becomes 'a deer on a red background'. The rules are regular expressions that work
sentence by sentence. They know a few hundred function words and no grammar, so an unusual sentence may come
out clumsy; what is certain is that no term of the concept is left in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from vce_ray.concepts.concept import Concept, fix_articles, plural, words_pattern
from vce_ray.pairs.captioner import ABBREVIATIONS

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
_ADJ = rf"(?:(?!{_STOP}(?![\w-]))[\w'-]+ ){{0,3}}"
_NP = rf"(?:\b{_DET} {_ADJ})"
_VERB = (
    r"(?:(?!(?:draw|paint|render|build|cloth|even|morn|ceil|k|r|th|str|w|spr|engrav|etch|print)ings?\b"
    r"|(?:r|b|sh|se|hundr)ed\b)"
    r"\w+(?:ing|ed)|(?:stand|sit|lie|rest|run|walk|hang|look|face|fl[iy]e?|swim|stare|graze|leap|jump|emerge|rise|fill"
    r"|dominate|surround|cover|grow|float|move|gaze|wait|sleep|lay|serve|add|create|give|make)s?)"
)
_HEAD = (  # what follows when the word before it ends its noun phrase; '%s' are nouns that look like verbs
    rf"(?=\s*(?:$|[,.;:!?)\"]|(?:{_PREP}|{_BE}|{_HOLDS}|and|or|but|who|which|that|while|as|can|may|will)\b"
    rf"|(?!(?:%s)\b){_VERB}\b))"
)
_DOES = rf"(?:{_BE}|{_HOLDS}|{_VERB}|\w+[^\Wsu]s|\w+ly)"

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
_SAYS_NOTHING = frozenset(_EMPTY_WORDS.split())


@dataclass(frozen=True)
class Refined:
    """A caption without the concept. `text` is '' when nothing that could be drawn is left: reject the row."""

    text: str
    removed_terms: tuple[str, ...]

    @property
    def nothing_left(self) -> bool:
        """Whether the caption said nothing but the concept."""
        return not self.text


def refine(caption: str, concept: Concept) -> Refined:
    """The caption without any term of the concept, grammatical as far as the rules reach, and what was taken out.

    Names and synonyms are replaced by `concept.replacement` where it has one; everything else is dropped
    together with the words that only led to it. A caption without the concept comes back as it is, but for
    its white space and quotation marks. Describe looks again whether the concept is in what comes back.
    """
    text = " ".join(caption.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"').split())
    removed = concept.mentions(text)
    if removed:
        rules = _rules(concept.kind, concept.names + concept.synonyms, concept.terms(), concept.replacement)
        sentences = _SENTENCE_GAP.split(text)
        text = " ".join(filter(None, (_refine_sentence(sentence, concept, rules) for sentence in sentences)))
    if not _says_something(text):
        text = ""
    return Refined(text, removed)


@dataclass(frozen=True)
class _Rules:
    naming: re.Pattern[str]
    """Names and synonyms; used only with a replacement."""
    compound: re.Pattern[str]
    """Adjectives made with a name, such as 'knife-wielding': they go even where names are replaced."""
    singular: frozenset[str]
    replacement: str
    dropping: tuple[tuple[re.Pattern[str], str], ...]


@lru_cache(maxsize=64)
def _rules(kind: str, names: tuple[str, ...], terms: tuple[str, ...], replacement: str) -> _Rules:
    """The rules of one concept, in the order in which they are tried."""
    is_name = re.compile(words_pattern(names), re.IGNORECASE)
    names = tuple(term for term in terms if is_name.search(term))  # 'dump truck' too, where 'truck' is a name
    naming = words_pattern(names)
    one = rf"(?:\"?(?:\b(?:\w+-)+)?{words_pattern(terms)}(?:-\w[\w-]*)?\"?(?:'s\b|')?(?: (?:him|her|it|them)self)?)"
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
        # '... of Picasso and Rembrandt' keeps Rembrandt
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
        # a sentence about it: 'The knife is bloody.'
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
        # the subject goes with its verb: 'There is a deer standing in a meadow' leaves 'a meadow'
        (rf"^(?:there (?:is|are) )?{_NP}?{t}{styled}{head}(?: {_DOES}){{0,2}}(?: {_PREP})?(?= \w)", ""),
        (rf"^(?:there is )?\b(?:an?|the) {_ADJ}{t} \w+[^\Wsu]s\b(?: {_PREP})?(?= \w)", ""),
        # what only leads to it: 'holding a big knife', 'with her breasts exposed', 'who is naked'
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
        naming=re.compile(rf"(?:\b(?:\w+-)+)?(?P<term>{naming})", re.IGNORECASE),
        compound=re.compile(rf"{naming}-(?:\w+ing|like|style|styled|inspired|shaped|esque|themed)\b ?", re.IGNORECASE),
        singular=frozenset(name.lower() for name in names),
        replacement=replacement,
        dropping=tuple((re.compile(pattern, re.IGNORECASE), put) for pattern, put in rules),
    )


def _aside(phrase: str) -> list[tuple[str, str]]:
    """Drops a phrase with the comma before it, and with the one after it too where a verb of the sentence follows."""
    verb = rf"(?= (?:{_HOLDS}|{_BE}|{_VERB})\b)"
    return [(rf",\s*\b{phrase},{verb}", ""), (rf",?\s*\b{phrase}", "")]


def _refine_sentence(sentence: str, concept: Concept, rules: _Rules) -> str:
    if not concept.mentions(sentence):
        return sentence
    text = _replace(sentence, rules) if rules.replacement else sentence
    while concept.mentions(text):  # again, should taking words out have brought others together
        for pattern, put in rules.dropping:
            text = " ".join(pattern.sub(put, text).split())
        text = _tidy(text)
    text = fix_articles(_tidy(text))
    if not _says_something(text):
        return ""
    return text[0].upper() + text[1:] if sentence.lstrip("\"'(")[:1].isupper() else text


def _replace(text: str, rules: _Rules) -> str:
    """Names and synonyms become the replacement, in the number and letter case of what they replace."""
    one, many = rules.replacement, plural(rules.replacement)

    def put(match: re.Match[str]) -> str:
        word, before, after = match["term"], text[: match.start()], text[match.end() :]
        several = re.sub(r"[\s_-]+", " ", word.lower()) not in rules.singular and word.lower() not in rules.singular
        if plural(word) == word:  # 'two deer', 'the deer are': the word itself does not tell
            several = bool(re.search(rf"\b{_MANY} (?:[\w-]+ ){{0,2}}$", before, re.IGNORECASE))
            several = several or bool(re.match(r" (?:are|were|have|graze|stand|run|gather)\b", after))
        noun = many if several else one
        return noun[0].upper() + noun[1:] if match.group()[0].isupper() and not before.strip(" \"'(") else noun

    text = rules.compound.sub("", text)
    text = rules.naming.sub(put, text)
    either = rf"(?:{re.escape(many)}|{re.escape(one)})\b"
    text = re.sub(rf"\b({either})(?: {either})+", r"\1", text, flags=re.IGNORECASE)
    item = rf"(?:(?:an?|the|some) )?{either}"
    return re.sub(rf"\b({item})(?:,? (?:and |or )?{item})+", r"\1", text, flags=re.IGNORECASE)


_TAIL = rf"(?:and|or|with|of|by|like|from|as|for|at|in|an?|the|{_BE}|(?:featur|show|depict|evok|resembl)ing)"
_TIDY = tuple(
    (re.compile(pattern, re.IGNORECASE), put)
    for pattern, put in (
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
    """Removes what taking words out leaves behind: doubled commas, empty brackets, dangling words."""
    before = None
    while text != before:
        before = text
        if text.count('"') % 2:
            text = text.replace('"', "")
        for pattern, put in _TIDY:
            text = pattern.sub(put, text).strip()
    return text


def _says_something(text: str) -> bool:
    return any(word not in _SAYS_NOTHING for word in re.findall(r"[^\W\d_][\w'-]*", text.lower()))
