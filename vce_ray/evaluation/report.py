"""The report of a run: one self-contained HTML page with images, pairs, curves, tables and rejects.

It needs only tables and dicts, so it can be rendered again from a run's store. Prompts and captions are untrusted text:
the template escapes all values, and the page's Content-Security-Policy allows no script and no request.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from vce_ray.concepts.concept import Concept
from vce_ray.config import EMBEDDED
from vce_ray.dataflow.rows import Row
from vce_ray.evaluation.charts import LINE_CLASSES, Series, line_chart
from vce_ray.evaluation.collapse import collapsed
from vce_ray.evaluation.formats import limit, percent, points, short
from vce_ray.evaluation.images import ImagePair, data_uri, pair_images, sample
from vce_ray.evaluation.metrics.limits import LIMITS, POINTS, exceeds, missed_limits, undecided_limits
from vce_ray.evaluation.page import render

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
"""Figures that the template has a row for. All others are listed below them by name, so that a new metric is shown
without a change here."""


@dataclass(frozen=True)
class ReportData:
    """The content of a report."""

    run: Row
    """run.json: name, config, concept, versions, git, stages {name: {state, seconds, rows, rejected}}, status."""
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


def warnings_of(data: ReportData) -> list[str]:
    """Return one sentence for each reason not to rely on the erasure: a collapsed training and every missed limit."""
    warnings = []
    if _collapsed(data.training):
        warnings.append(
            "Training collapsed: the margin grew while the safe images also became clearly less likely. The model has "
            "unlearned part of what it should draw instead. Try fewer steps, a lower learning rate or a larger "
            "keep_weight."
        )
    missed = missed_limits(data.metrics)
    return warnings + [f"{_missed_sentence(name, data.metrics)}; the limit is {limit(name)}." for name in missed]


def _missed_sentence(name: str, metrics: Row) -> str:
    """Describe a metric that exceeds its limit. One that has no sentence of its own is named."""
    value = metrics[name]
    if name == "seen_after":
        return f"The concept is still seen in {percent(value)} of the images"
    if name == "worst_neighbour_drop":
        return f"The neighbour {metrics['worst_neighbour']} lost {points(value, signed=False)}"
    if name == "kept_drop":
        return f"All neighbours together lost {points(value, signed=False)}"
    if name == "score_drop":
        return f"The image-text score on kept prompts fell by {percent(value)}"
    return f"{name} is {points(value, signed=False) if name in POINTS else percent(value)}"


def _met_phrases(metrics: Row) -> list[str]:
    """Describe each limit that was checked, for a run that meets all of them."""
    phrases = {
        "seen_after": "the concept is seen in at most {} of the images",
        "worst_neighbour_drop": "no neighbour lost more than {}",
        "kept_drop": "all neighbours together lost no more than {}",
        "score_drop": "the image-text score fell by no more than {}",
    }
    checked = [name for name in LIMITS if metrics.get(name) is not None]
    return [phrases.get(name, f"{name} is at most {{}}").format(limit(name)) for name in checked]


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
    still_seen = [pair for pair in erase if pair.after["label"] in names]
    lost = [
        pair
        for pair in keep
        if pair.before["name"] and pair.before["label"] == pair.before["name"] != pair.after["label"]
    ]
    return {
        "run_name": data.run.get("name") or "Unnamed run",
        "base": config.get("base") or "its base model",
        "concept": data.concept,
        "metrics": data.metrics,
        "figures": figures,
        "other_figures": [(name, figure) for name, figure in figures.items() if name not in IN_TABLE],
        "warnings": warnings_of(data),
        "missed": missed_limits(data.metrics),
        "undecided": undecided_limits(data.metrics),
        "met": _listed(_met_phrases(data.metrics), "and"),
        "missed_neighbours": [
            row["name"] for row in data.metrics["neighbours"] if exceeds("worst_neighbour_drop", row["drop"]["value"])
        ],
        "veil": data.concept.kind == "explicit" and config.get("base") != EMBEDDED,
        "hero": [
            ("erase", f"Prompts that ask for {_listed(names, 'or')}", _tiles(sample(erase, COLUMNS))),
            ("keep", "Neighbours that must stay", _tiles(sample(keep, COLUMNS))),
        ],
        "misses": [
            ("erase", "The concept is still seen", len(still_seen), len(erase), _tiles(sample(still_seen, COLUMNS))),
            ("keep", "A neighbour is no longer recognized", len(lost), len(keep), _tiles(sample(lost, COLUMNS))),
        ],
        "pairs": [_pair(row) for row in data.pairs[:MAX_PAIRS]],
        "curves": _charts(data.training, data.curves),
        "steps": len(data.training),
        "rejects": _rejects(data.rejects),
        "num_rejects": len(data.rejects),
        "stages": [(name, stage) for name, stage in data.run.get("stages", {}).items() if name != "report"],
        "settings": [
            ("Settings", _flat(config)),
            ("Concept", _flat(data.concept.model_dump(mode="json", exclude={"labels", "slots"}))),
            ("Versions", _flat(data.run.get("versions", {}) | {"git": data.run.get("git")})),
        ],
        "started": _date(data.run),
    }


def _listed(parts: Sequence[str], conjunction: str) -> str:
    """Join parts as in 'a, b or c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {conjunction} {parts[-1]}"


def _tiles(pairs: Sequence[ImagePair]) -> list[Row]:
    return [
        {
            "prompt": pair.before["prompt"],
            "seed": pair.before["seed"],
            "labels": (pair.before["label"], pair.after["label"]),
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
        charts.append({"title": curve.title, "legend": legend, "svg": svg})
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


def _date(run: Row) -> str | None:
    started = [stage["started"] for stage in run.get("stages", {}).values() if "started" in stage]
    return datetime.fromtimestamp(min(started), UTC).strftime("%d %B %Y, %H:%M UTC") if started else None
