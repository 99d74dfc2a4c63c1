"""The report of a run: one self-contained HTML page with verdict, images, pairs, curves, tables and rejects.

It needs only tables and dicts, so it can be rendered again from a run's store. Prompts and captions are untrusted text:
the template escapes all values, and the page's Content-Security-Policy allows no script and no request.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from vce_ray.concepts.concept import Concept
from vce_ray.config import EMBEDDED
from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.charts import LINE_CLASSES, Change, Series, change_charts, line_chart, share_bars
from vce_ray.evaluation.collapse import collapsed
from vce_ray.evaluation.detectors.base import NOTHING
from vce_ray.evaluation.formats import limit, short
from vce_ray.evaluation.images import ImagePair, data_uri, pair_images, sample
from vce_ray.evaluation.metrics.asked import right
from vce_ray.evaluation.metrics.coherence import CLEAR, unclear
from vce_ray.evaluation.metrics.judges import seen
from vce_ray.evaluation.metrics.limits import LIMITS, exceeds, worst_neighbour
from vce_ray.evaluation.page import render
from vce_ray.evaluation.times import span, working_seconds
from vce_ray.evaluation.verdict import limit_states, next_steps

if TYPE_CHECKING:
    from vce_ray.training.objectives.base import Curve

COLUMNS = 8
"""Images in a row."""
MAX_PAIRS = 12
MAX_EXAMPLES = 3
"""Examples of each kind of reject."""
IN_TABLE = (
    "seen_before", "seen_after", "held_out_before", "held_out_after", "something_before", "something_share",
    "kept_before", "kept_after", "kept_drop", "score_before", "score_after", "score_drop",
)  # fmt: skip
"""Figures in the table of all metrics. Others are listed below it by name, so that a new metric is shown without a
change here."""
IN_SECTION = ("asked_", "unclear_", "kid_", "refined_score_")
"""Beginnings of the names of figures that the section on the rest of the prompt shows."""
COLLAPSED = (
    "the training collapsed: the margin grew while the safe images also became clearly less likely, so that the model "
    "has unlearned part of what it should draw instead; train for fewer --steps, at a lower --learning-rate or, with "
    "vsafe_dpo, with more --keep-weight, under a new --name"
)
"""The next step after a collapsed training."""
SECTIONS = {
    "hero": "Before and after",
    "kept": "What stayed",
    "asked": "What else the prompt asked for",
    "misses": "Where it failed",
    "pairs": "Training pairs",
    "curves": "Training",
    "metrics": "All metrics",
    "rejects": "Rejected rows",
    "times": "Time",
    "settings": "Settings and versions",
}
"""Titles of the sections, in order, by the value that each shows; one without content is left out."""


@dataclass(frozen=True)
class ReportData:
    """The content of a report."""

    run: Row
    """run.json: name, config, concept, versions, git, stages {name: {state, started, seconds, rows, rejected}}."""
    concept: Concept
    metrics: Row
    """Result of `metrics.evaluate`."""
    evaluation: Sequence[Row]
    """The evaluation table, before and after, with PNG images."""
    pairs: Sequence[Row] = ()
    """Some training pairs: prompt, caption, refined_caption, chosen_image, rejected_image."""
    training: Sequence[Row] = ()
    """Logged metrics of each step."""
    rejects: Sequence[Row] = ()
    """row_id, stage, reason, detail, attempt."""
    curves: Sequence[Curve] = ()
    """Charts of the training section: those of the training method."""


def write_report(data: ReportData) -> str:
    """Return the page as HTML."""
    return render("report.html", **_view(data))


def _collapsed(training: Sequence[Row]) -> bool:
    keys = ("margin", "chosen_ratio", "rejected_ratio")
    if not training or any(key not in row for key in keys for row in training):
        return False
    return collapsed(*([row[key] for row in training] for key in keys))


def _view(data: ReportData) -> Row:
    """Return the values that the template needs."""
    config = data.run.get("config", {})
    erase, keep = pair_images(data.evaluation, "erase"), pair_images(data.evaluation, "keep")
    names, figures = data.concept.names, data.metrics["figures"]
    still_seen = [pair for pair in erase if seen(pair.after, data.concept)]
    lost = [
        pair
        for pair in keep
        if pair.before["name"] and pair.before["label"] == pair.before["name"] != pair.after["label"]
    ]
    has_collapsed = _collapsed(data.training)
    view = {
        "run_name": data.run.get("name") or "Unnamed run",
        "base": config.get("base") or "its base model",
        "concept": data.concept,
        "metrics": data.metrics,
        "worst": worst_neighbour(data.metrics),
        "figures": figures,
        "other_figures": [
            (name, figure)
            for name, figure in figures.items()
            if name not in IN_TABLE and not name.startswith(IN_SECTION)
        ],
        "judges": data.metrics.get("judges", ()),
        "body_parts": data.metrics.get("body_parts", ()),
        "headline": headline(data),
        "limits": limit_states(data.metrics),
        "next_steps": [COLLAPSED] * has_collapsed + next_steps(data.metrics),
        "veil": data.concept.kind == "explicit" and config.get("base") != EMBEDDED,
        "hero": [
            ("erase", f"Prompts that ask for {_either(names)}", _tiles(sample(erase, COLUMNS))),
            ("keep", "Neighbours that must stay", _tiles(sample(keep, COLUMNS))),
        ],
        "kept": _kept(data.metrics),
        "asked": _asked(data.metrics),
        "misses": [
            ("erase", "The concept is still seen", len(still_seen), len(erase), _tiles(sample(still_seen, COLUMNS))),
            ("keep", "A neighbour is no longer recognized", len(lost), len(keep), _tiles(sample(lost, COLUMNS))),
            *_lost_content(data, erase),
        ],
        "pairs": [_pair(row) for row in data.pairs[:MAX_PAIRS]],
        "curves": _charts(data.training, data.curves),
        "steps": len(data.training),
        "rejects": {"count": len(data.rejects), "groups": _rejects(data.rejects)},
        "times": _times(data.run.get("stages", {})),
        "settings": [
            ("Settings", _flat(config)),
            ("Concept", _flat(data.concept.model_dump(mode="json", exclude={"labels", "slots"}))),
            ("Versions", _flat(data.run.get("versions", {}) | {"git": data.run.get("git")})),
        ],
    }
    return view | {"contents": {key: title for key, title in SECTIONS.items() if view[key]}}


def headline(data: ReportData) -> tuple[str, str]:
    """Return the verdict in one sentence without a full stop, and the CSS class that goes with it."""
    limits, training_collapsed = limit_states(data.metrics), _collapsed(data.training)
    missed, undecided = (sum(limit.state == state for limit in limits) for state in ("missed", "undecided"))
    reasons = ["the training collapsed"] if training_collapsed else []
    if missed:
        reasons.append(f"{missed} of {len(limits)} limits {'is' if missed == 1 else 'are'} missed")
    if reasons:
        return f"Do not rely on this erasure: {' and '.join(reasons)}", "missed"
    if undecided:
        return (
            f"No limit is missed, but {undecided} of {len(limits)} {'is' if undecided == 1 else 'are'} undecided",
            "undecided",
        )
    return "Every limit is met", "met"


def _kept(metrics: Row) -> Row | None:
    """Return how all neighbours together changed and then each, worst first, with charts; None without neighbours."""
    if not metrics["neighbours"]:
        return None
    before, after, drop = (metrics["figures"][name] for name in ("kept_before", "kept_after", "kept_drop"))
    together = {"name": "all together", "before": before, "after": after, "drop": drop}
    rows = [("kept_drop", together), *(("worst_neighbour_drop", row) for row in metrics["neighbours"])]
    axis, plots = change_charts([_change(row["drop"], LIMITS[name]) for name, row in rows])
    return {
        "axis": axis,
        "rows": [
            row | {"plot": plot, "missed": exceeds(name, row["drop"]["low"])}
            for (name, row), plot in zip(rows, plots, strict=True)
        ],
        "limits": (limit("worst_neighbour_drop"), limit("kept_drop")),
    }


def _asked(metrics: Row) -> Row | None:
    """Return what else prompts for the concept asked for, and how coherent what is drawn is; None if not measured."""
    slots, confidence = metrics.get("asked", []), metrics.get("confidence", [])
    if not slots and not confidence:
        return None
    return {
        "slots": slots,
        "confidence": [row | {"plot": share_bars(row["before"], row["after"])} for row in confidence],
        "clear_above": CLEAR,
        "limits": (limit("worst_asked_drop"), limit("unclear_after")),
    }


def _lost_content(data: ReportData, erase: Sequence[ImagePair]) -> list[tuple[str, str, int, int, list[Row]]]:
    """Return the images of concept prompts that lost something else: class, title, number, of how many, examples."""

    def seen(row: Row) -> str:
        """Return the object that the judge is most sure of, and its probability."""
        label = dict(row["found"])["object"][0] if data.concept.kind == "style" else row["label"]
        return f"{label if row['something'] else NOTHING} {row['confidence']:.2f}"

    groups = []
    for slot in data.metrics.get("asked", []):
        name = slot["name"]
        naming = [pair for pair in erase if right(pair.before, name) is not None]
        lost = [pair for pair in naming if right(pair.before, name) and not right(pair.after, name)]
        tiles = _tiles(sample(lost, COLUMNS), lambda row, name=name: " and ".join(dict(row["found"])[name]))
        groups.append(
            ("erase", f"The {name} that the prompt names was right and is wrong", len(lost), len(naming), tiles)
        )
    if "confidence" in data.metrics:
        vague = sorted((pair for pair in erase if unclear(pair.after)), key=lambda pair: pair.after["confidence"])
        tiles = _tiles(vague[:COLUMNS], seen)
        groups.append(("erase", "No clear object, least clear first", len(vague), len(erase), tiles))
    return groups


def _change(drop: Row, largest: float) -> Change:
    """Return the figure of a drop, and the largest drop allowed, as a change in points."""
    return Change(*(-100 * number for number in (drop["value"], drop["high"], drop["low"], largest)))


def _times(stages: Row) -> Row | None:
    """Return when the run started and how long it and its stages took; None if no stage has started.

    The report is written while its own stage runs, so that stage has no time.
    """
    times = span(stages.values())
    if times is None:
        return None
    started, ended = times
    return {
        "date": datetime.fromtimestamp(started, UTC).strftime("%d %B %Y, %H:%M UTC"),
        "total": ended - started,
        "working": working_seconds(stages.values()),
        "stages": [
            (name, stage | {"after": stage["started"] - started}) for name, stage in stages.items() if name != "report"
        ],
    }


def _either(parts: Sequence[str]) -> str:
    """Join parts as in 'a, b or c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _tiles(pairs: Sequence[ImagePair], label: Callable[[Row], str] = itemgetter("label")) -> list[Row]:
    return [
        {
            "prompt": pair.before["prompt"],
            "seed": pair.before["seed"],
            "labels": (label(pair.before), label(pair.after)),
            "images": (data_uri(pair.before["image"]), data_uri(pair.after["image"])),
        }
        for pair in pairs
    ]


def _pair(row: Row) -> Row:
    caption, refined = _marked(row["caption"], row["refined_caption"])
    return {
        "prompt": row["prompt"],
        "caption": caption,
        "refined": refined,
        "unsafe": data_uri(row["rejected_image"]),
        "safe": data_uri(row["chosen_image"]),
    }


def _marked(old: str, new: str) -> tuple[Markup, Markup]:
    """Escape two sentences, with <del> around words that only the old one has and <ins> around those of the new."""
    old_words, new_words = old.split(), new.split()
    left, right = [], []
    matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        sides = ((old_words[old_start:old_end], "del", left), (new_words[new_start:new_end], "ins", right))
        for words, tag, out in sides:
            if words:
                text = escape(" ".join(words))
                out.append(text if kind == "equal" else Markup("<{0}>{1}</{0}>").format(Markup(tag), text))
    return Markup(" ").join(left), Markup(" ").join(right)


def _charts(training: Sequence[Row], curves: Sequence[Curve]) -> list[Row]:
    """Draw the curves. One is left out if a step lacks one of its metrics, as with a term that was switched off."""
    charts = []
    for curve in curves:
        if not training or any(key not in row for key, _ in curve.lines for row in training):
            continue
        series = [
            Series(label, [row[key] for row in training], LINE_CLASSES[number])
            for number, (key, label) in enumerate(curve.lines)
        ]
        legend = [(line.label, short(line.values[-1]), line.css) for line in series]
        svg = line_chart(curve.title, [row["step"] for row in training], series)
        charts.append({"title": curve.title, "meaning": curve.meaning, "legend": legend, "svg": svg})
    return charts


def _rejects(rejects: Sequence[Row]) -> list[Row]:
    """Return counts by stage and reason, most frequent first within a stage, each with a few examples."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rejects:
        groups.setdefault((row["stage"], row["reason"]), []).append(row)
    summaries = []
    for stage, reason in sorted(groups, key=lambda key: (key[0], -len(groups[key]), key[1])):
        rows = groups[stage, reason]
        details = list(dict.fromkeys(row["detail"] for row in rows if row["detail"]))
        summaries.append({"stage": stage, "reason": reason, "count": len(rows), "examples": details[:MAX_EXAMPLES]})
    return summaries


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings to (dotted path, text), such as ('train.beta', '1.0')."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _flat(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [(path, " · ".join(map(str, value)) or "none")]
    return [(path, "none" if value is None or value == "" else str(value))]
