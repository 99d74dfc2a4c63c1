"""Measure the filter of captions on tests/data/captions_labelled.jsonl, by its rules alone.

    python -m benchmarks.captions       # prints the table and every failing case, writes docs/results/captions.json
    python -m benchmarks.captions --split "held out third" --texts     # also prints every refined caption of a part

Each line of the file is one caption, with the concept that it is refined for and the catalogue of that concept:

    mentions    whether the caption mentions the concept
    keep        words that the refined caption must still have (by their beginnings)
    gone        words that it must not have
    accepted    refined captions that a reader has found grammatical and complete
    faulty      refined captions that a reader has found wanting
    split       part of the set: 'open' was used in writing the rules; the others were labelled before and run after

A refined caption counts as bad if it has lost a word of `keep`, has a word of `gone`, is empty though something could
have stayed, fails the mechanical checks below, or is not in `accepted`: one that no reader has seen counts as bad.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.config import EMBEDDED
from vce_ray.evaluation.metrics.intervals import share
from vce_ray.pairs.grammar import fault
from vce_ray.pairs.refine import is_gutted, refine

LABELLED = Path("tests/data/captions_labelled.jsonl")
RESULTS = Path("docs/results/captions.json")
ANY_OTHER = "any/other"
"""Name of a base that is not the embedded one, so that the catalogue of real models is taken."""
_BROKEN = re.compile(
    r"\b(?:an?|the) (?:an?|the|of|in|on|at|with|and|or|is|are|by|from|to)\b|\b(\w+) \1\b|,\s*[,.]|\s[,.;]|\(\s*\)"
    r"|\b(?:and|or|with|of|by|a|an|the|is|are|in|at|from|to)[.,]?$|^(?:and|or|of|by|,)\b|\b(?:with|of) (?:is|and|,)",
    re.IGNORECASE,
)
"""What is wrong in any text, without a parse: an independent check of the rules and of their own grammar."""


@dataclass
class Outcome:
    """What the filter makes of one labelled caption."""

    label: dict[str, Any]
    found: tuple[str, ...]
    """Terms that are found in it."""
    refined: str
    problems: list[str]
    """Why the refined caption is bad; empty if it is good, or not asked for."""


def read_labels(path: Path = LABELLED) -> list[dict[str, Any]]:
    """Read the labelled captions."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def concept_of(label: dict[str, Any]) -> Concept:
    """Return the concept that a caption is labelled for."""
    return load_concept(label["concept"], EMBEDDED if label["base"] == EMBEDDED else ANY_OTHER)


def judge(label: dict[str, Any]) -> Outcome:
    """Run the filter on a caption and compare with its labels."""
    concept = concept_of(label)
    found = concept.mentions(label["caption"])
    if not label["mentions"] or not found:
        return Outcome(label, found, "", [])
    refined = refine(label["caption"], concept)
    return Outcome(label, found, refined, problems(label, refined))


def problems(label: dict[str, Any], refined: str) -> list[str]:
    """Return what is wrong with a refined caption, by its labels and mechanically."""
    if not refined:
        return ["nothing left"] if label["keep"] else []
    text = refined.lower()
    lost = [word for word in label["keep"] if not re.search(rf"(?<!\w){re.escape(_stem(word))}", text)]
    left = [word for word in label["gone"] if re.search(_whole(word), text)]
    wrong = [f"lost {', '.join(lost)}"] if lost else []
    wrong += [f"still has {', '.join(left)}"] if left else []
    if _BROKEN.search(refined) or fix_articles(refined) != refined or refined.count('"') % 2:
        wrong.append("broken")
    if problem := fault(refined):
        wrong.append(f"refused: {problem}")
    if is_gutted(label["caption"], refined):
        wrong.append("refused: most of the caption is lost")
    if refined in label.get("faulty", ()):
        wrong.append("a reader finds it wanting")
    elif refined not in label.get("accepted", ()):
        wrong.append("no reader has seen it")
    return wrong


def _stem(word: str) -> str:
    return word.lower()[: max(4, len(word) - 1)]


def _whole(word: str) -> str:
    if not word.isascii():
        return re.escape(word)
    return rf"(?<!\w){re.escape(word.lower())}" + (r"\b" if len(word) < 5 else "")


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of some outcomes: shares with their 95 % intervals."""
    mentioned = [outcome for outcome in outcomes if outcome.label["mentions"]]
    others = [outcome for outcome in outcomes if not outcome.label["mentions"]]
    refined = [outcome for outcome in mentioned if outcome.found]
    return {
        "captions": len(outcomes),
        "recall": _share(bool(outcome.found) for outcome in mentioned),
        "false_alarms": _share(bool(outcome.found) for outcome in others),
        "bad_refined": _share(bool(outcome.problems) for outcome in refined),
        "refused": _share(any("refused" in problem for problem in outcome.problems) for outcome in refined),
    }


def _share(flags: Iterable[bool]) -> dict[str, Any]:
    flags = list(flags)
    figure = share(flags)
    assert figure.value is not None and figure.low is not None and figure.high is not None
    interval = [round(figure.low, 4), round(figure.high, 4)]
    return {"count": sum(flags), "of": len(flags), "share": round(figure.value, 4), "interval": interval}


def speed(labels: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return captions per second: those without the concept, and those that are refined, each parsed anew."""
    from vce_ray.concepts.language import parse

    figures = {}
    for name, mentions in (("without_the_concept", False), ("refined", True)):
        work = [(label["caption"], concept_of(label)) for label in labels if label["mentions"] == mentions]
        parse.cache_clear()
        start = time.process_time()
        for caption, concept in work:
            if concept.mentions(caption):
                fault(refine(caption, concept))
        figures[name] = round(len(work) / (time.process_time() - start), 1)
    return figures


def table(parts: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table, one row for each part of the set."""
    lines = ["| part | captions | concept found | false alarms | refined badly |", "|---|---|---|---|---|"]
    for name, figures in parts.items():
        cells = [_cell(figures[key]) for key in ("recall", "false_alarms", "bad_refined")]
        lines.append(f"| {name} | {figures['captions']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(share: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in share["interval"])
    return f"{share['count']} of {share['of']}: {100 * share['share']:.1f} % ({low:.1f} to {high:.1f})"


def failing(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return every caption that is missed, a false alarm, or refined badly."""
    cases = []
    for outcome in outcomes:
        if bool(outcome.found) != outcome.label["mentions"]:
            why = ["missed"] if outcome.label["mentions"] else [f"false alarm: {', '.join(outcome.found)}"]
        else:
            why = outcome.problems
        if why:
            keys = ("split", "concept", "caption")
            cases.append({key: outcome.label[key] for key in keys} | {"refined": outcome.refined, "why": why})
    return cases


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", help="one part of the set only; writes nothing")
    parser.add_argument("--texts", action="store_true", help="print every refined caption")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    labels = [label for label in read_labels() if args.split in (None, label["split"])]
    outcomes = [judge(label) for label in labels]
    splits = list(dict.fromkeys(label["split"] for label in labels))
    parts = {split: summary([o for o in outcomes if o.label["split"] == split]) for split in splits}
    parts |= {"all": summary(outcomes)} if len(splits) > 1 else {}
    cases = failing(outcomes)
    if args.texts:
        for outcome in outcomes:
            if outcome.label["mentions"]:
                print(f"{outcome.label['concept']}: {outcome.label['caption']}\n    {outcome.refined}")
    for case in cases:
        print(f"{case['concept']}: {case['caption']}\n    {case['refined'] or '-'}\n    {'; '.join(case['why'])}")
    print(table(parts))
    rates = speed(labels)
    print(
        f"captions per second on one core: {rates['without_the_concept']} without the concept, "
        f"{rates['refined']} refined"
    )
    if args.split is None:
        command = shlex.join(["python", "-m", "benchmarks.captions", *sys.argv[1:]])
        report = {"command": command, "parts": parts, "captions_per_second": rates, "failing": cases}
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
