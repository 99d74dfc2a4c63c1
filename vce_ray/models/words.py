"""Closed vocabularies: the words of a model that was trained on few, and prompts in the form in which it knows them.

A checkpoint or judge with the file words.txt knows the words in it and no others. Its tokenizer tells 'Deer' from
'deer', so texts are normalized before it. Texts for other models are left alone: released models were trained on
capitals and punctuation.

The file is no part of `folder_revision`: a text of known words, such as the catalogue's templates write, is its own
normal form, so adapters and stored log-probs remain valid.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vce_ray.config import EMBEDDED
from vce_ray.errors import UserError, quote
from vce_ray.models.folder import local_folder

WORDS = "words.txt"
"""File of a checkpoint folder with one known word per line, the most useful to a reader first."""
SHOWN_UNKNOWN = 5
"""Unknown words that a message lists; the others are only counted."""
SHOWN_KNOWN = 60
"""Known words that a message lists."""
_CLAUSE_ENDS = ",.;:!?"
_APOSTROPHES = "'\u2018\u2019"


class Vocabulary:
    """All words that a model knows."""

    def __init__(self, words: Iterable[str]):
        self.words = dict.fromkeys(words)
        """In the order of the file."""

    @classmethod
    def of(cls, folder: Path) -> Vocabulary | None:
        """Read the words of a checkpoint or judge; None if it has no such file, so is not closed."""
        path = folder / WORDS
        return cls(path.read_text(encoding="utf-8").split()) if path.exists() else None

    def check(self, texts: Iterable[str], where: str) -> None:
        """Raise UserError if a text contains a word that is not known; `where` says where the texts are from."""
        if problem := self.problem(texts):
            raise UserError(f"{where}: {problem}")

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that the model does not know; the whole text if it contains no word at all."""
        words = normalize(text).replace(",", "").split()
        return [word for word in words if word not in self.words] if words else [text]

    def problem(self, texts: Iterable[str]) -> str | None:
        """Return a clause about the words of the texts that are not known, and those that are; None if all are."""
        texts = list(texts)
        found = [dict.fromkeys(self.unknown(text)) for text in texts]
        counts = Counter(word for words in found for word in words)
        if not counts:
            return None
        num_texts = sum(map(bool, found))
        listed = [self._with_hint(word) for word, _ in counts.most_common(SHOWN_UNKNOWN)]
        more = [f"{len(counts) - SHOWN_UNKNOWN} more"] if len(counts) > SHOWN_UNKNOWN else []
        where = f"{num_texts} of {len(texts)} contain" if len(texts) > 1 else f"{quote(texts[0])} contains"
        others = f" and {len(self.words) - SHOWN_KNOWN} others" if len(self.words) > SHOWN_KNOWN else ""
        return (
            f"{where} words that the model does not know: {', '.join(listed + more)}. "
            f"It knows {', '.join(list(self.words)[:SHOWN_KNOWN])}{others}"
        )

    def _with_hint(self, word: str) -> str:
        close = difflib.get_close_matches(word[:40], self.words, n=1, cutoff=0.8) if len(word) > 2 else []
        return f"{quote(word)} (did you mean {close[0]}?)" if close else quote(word)


def vocabulary_of(base: str) -> Vocabulary | None:
    """Return the vocabulary of a base model on this machine; None if it is not closed, or not on this machine."""
    folder = local_folder(base) if base == EMBEDDED or Path(base).is_dir() else None
    return folder and Vocabulary.of(folder)


def normalize(text: str) -> str:
    """Return a text in lower case and NFKC, without punctuation but for single commas between clauses.

    'A Deer!' becomes 'a deer', and '\u201cdeer\u201d; Noto style.' becomes 'deer, noto style'.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    clauses = "".join(map(_plain_character, text)).split(",")
    return ", ".join(filter(None, (" ".join(clause.split()) for clause in clauses)))


def _plain_character(character: str) -> str:
    if character in _CLAUSE_ENDS:
        return ","
    kind = unicodedata.category(character)
    if character in _APOSTROPHES or kind == "Cf":  # Cf: invisible ones, such as soft hyphens
        return ""
    return " " if kind[0] in "PZC" else character  # punctuation, separators, control characters
