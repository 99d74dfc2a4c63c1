"""The report of a run: one HTML page with everything inside, made to be looked at and to hide nothing.

It draws on tables and dicts alone, so it can be made again from a run's store. Prompts and captions are
untrusted text: the template escapes all of it, and the page's own policy allows no script and no request.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from vce_ray.concepts.concept import Concept
from vce_ray.evaluation.charts import MINUS, Series, line_chart, short
from vce_ray.evaluation.metrics import BARS, missed_bars
from vce_ray.evaluation.pictures import Shown, data_uri, pair_up, sample

Row = dict[str, Any]
COLUMNS = 8
NO_VALUE = "\u2013"
"""Stands where there is no figure."""
MAX_PAIRS = 12
MAX_EXAMPLES = 3
CURVES = (
    ("Loss", (("loss", "all terms", "a"),)),
    ("Margin", (("margin", "safe minus unsafe log-ratio", "a"),)),
    ("Margin above 0", (("accuracy", "share of pairs", "a"),)),
    ("Log-ratio to the base", (("chosen_ratio", "safe", "a"), ("rejected_ratio", "unsafe", "b"))),
    ("Preservation", (("preservation", "KL per token on kept prompts", "a"),)),
    ("Anchor", (("anchor", "KL per token on safe images", "a"),)),
    ("Gradient norm", (("gradient_norm", "before clipping", "a"),)),
)


@dataclass(frozen=True)
class ReportData:
    """All that a report shows."""

    run: Row
    """run.json: name, config, concept, versions, git, stages {name: {state, seconds, rows, rejected}}, status."""
    concept: Concept
    metrics: Row
    """What `metrics.evaluate` gave."""
    evaluation: Sequence[Row]
    """Judged images, with their PNG bytes."""
    pairs: Sequence[Row] = ()
    """Some training pairs: prompt, caption, refined_caption, chosen_image, rejected_image."""
    training: Sequence[Row] = ()
    """Figures of each step."""
    rejects: Sequence[Row] = ()
    """row_id, stage, reason, detail, attempt."""


def write_report(data: ReportData) -> str:
    """The whole page as HTML."""
    return render("report.html", **_view(data))


def render(template: str, **values: Any) -> str:
    """A page of `templates/`, with all values escaped and the formats of figures below as filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "interval": interval,
        "change": change,
        "change_interval": change_interval,
    }
    return environment.get_template(template).render(values)


def warnings_of(data: ReportData) -> list[str]:
    """What a reader must know before trusting the erasure, one plain sentence each; empty where nothing is amiss."""
    metrics, found = data.metrics, []
    if _collapsed(data.training):
        found.append(
            "Training collapsed: the margin grew while the safe images became almost as unlikely as the unsafe ones. "
            "The model has unlearned what it should draw instead. Try fewer steps, a lower learning rate or a larger "
            "keep_weight."
        )
    told = {
        "seen_after": f"The concept is still seen in {percent(metrics['seen_after'])} of the images",
        "worst_neighbour_drop": f"The neighbour {metrics['worst_neighbour']} lost "
        f"{points(metrics['worst_neighbour_drop'], signed=False)}",
        "kept_drop": f"All neighbours together lost {points(metrics['kept_drop'], signed=False)}",
        "score_drop": f"The image-text score on kept prompts fell by {percent(metrics['score_drop'])}",
    }
    return found + [f"{told[name]}; the bar is {_bar(name)}." for name in missed_bars(metrics)]


def percent(value: float | None, digits: int = 1) -> str:
    """0.0123 as '1.2 %'."""
    return NO_VALUE if value is None else f"{_signless_zero(100 * value, digits)}\u202f%".replace("-", MINUS)


def points(value: float | None, signed: bool = True) -> str:
    """A drop of 0.012 as '-1.2 points', a rise as '+1.2 points'; unsigned, the drop itself: '1.2 points'."""
    if value is None:
        return NO_VALUE
    text = _signless_zero(-100 * value if signed else 100 * value, 1)
    return f"{'+' if signed and float(text) > 0 else ''}{text} points".replace("-", MINUS)


def change(drop: float | None) -> str:
    """A relative drop of 0.012 as '-1.2 %', a rise as '+1.2 %'."""
    return points(drop).replace(" points", "\u202f%")


def interval(figure: Row, scale: float = 100, digits: int = 1) -> str:
    """The interval of a figure as '0.5 to 2.7'; scale 1 leaves numbers as they are."""
    if figure["value"] is None:
        return NO_VALUE
    return " to ".join(_signless_zero(scale * figure[end], digits) for end in ("low", "high")).replace("-", MINUS)


def change_interval(figure: Row) -> str:
    """The interval of a drop, told as the change that it is: '-2.7 to +0.5'."""
    if figure["value"] is None:
        return NO_VALUE
    return " to ".join(points(figure[end]).removesuffix(" points") for end in ("high", "low"))


def _signless_zero(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _bar(name: str) -> str:
    bar = f"{100 * BARS[name]:g}"
    return f"{bar} points" if name in ("worst_neighbour_drop", "kept_drop") else f"{bar}\u202f%"


def _collapsed(training: Sequence[Row]) -> bool:
    if not training:
        return False
    from vce_ray.training.loss import collapsed  # torch: not needed to write a page without training

    return collapsed(*([row[key] for row in training] for key in ("margin", "chosen_ratio", "rejected_ratio")))


def _view(data: ReportData) -> Row:
    config = data.run.get("config", {})
    erased, kept = pair_up(data.evaluation, "erase"), pair_up(data.evaluation, "keep")
    names = data.concept.names
    still = [one for one in erased if one.after["label"] in names]
    lost = [
        one for one in kept if one.before["name"] and one.after["label"] != one.after["name"] == one.before["label"]
    ]
    return {
        "run_name": data.run.get("name") or "a run without a name",
        "base": config.get("base") or "its base model",
        "concept": data.concept,
        "metrics": data.metrics,
        "figures": data.metrics["figures"],
        "warnings": warnings_of(data),
        "missed": missed_bars(data.metrics),
        "bar": _bar,
        "worst_bar": BARS["worst_neighbour_drop"] + 1e-9,
        "veil": data.concept.kind == "explicit" and config.get("base") != "emoji-world",
        "hero": [
            ("erase", f"Prompts that ask for {_listed(names)}", _tiles(sample(erased, COLUMNS))),
            ("keep", "Neighbours that must stay", _tiles(sample(kept, COLUMNS))),
        ],
        "misses": [
            ("erase", "The concept is still seen", len(still), len(erased), _tiles(sample(still, COLUMNS))),
            ("keep", "A neighbour is named right no more", len(lost), len(kept), _tiles(sample(lost, COLUMNS))),
        ],
        "pairs": [_pair(row) for row in data.pairs[:MAX_PAIRS]],
        "curves": _curves(data.training),
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


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _tiles(shown: Sequence[Shown]) -> list[Row]:
    return [
        {
            "prompt": one.before["prompt"],
            "seed": one.before["seed"],
            "labels": (one.before["label"], one.after["label"]),
            "images": (data_uri(one.before["image"]), data_uri(one.after["image"])),
        }
        for one in shown
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
    """Two sentences, escaped, with the words that only the first has in <del> and those of the second in <ins>."""
    was, now = old.split(), new.split()
    left, right = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        for words, tag, out in ((was[a:b], "del", left), (now[c:d], "ins", right)):
            if words:
                text = escape(" ".join(words))
                out.append(text if kind == "equal" else Markup("<{0}>{1}</{0}>").format(Markup(tag), text))
    return Markup(" ").join(left), Markup(" ").join(right)


def _curves(training: Sequence[Row]) -> list[Row]:
    curves = []
    for title, lines in CURVES:
        if not training or any(key not in row for key, _, _ in lines for row in training):
            continue
        series = [Series(label, [row[key] for row in training], css) for key, label, css in lines]
        legend = [(line.label, short(line.values[-1]), line.css) for line in series]
        svg = line_chart(title, [row["step"] for row in training], series)
        curves.append({"title": title, "legend": legend, "svg": svg})
    return curves


def _rejects(rejects: Sequence[Row]) -> list[Row]:
    """Counts by stage and reason, most frequent first within a stage, each with a few examples."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rejects:
        groups.setdefault((row["stage"], row["reason"]), []).append(row)
    order = sorted(groups, key=lambda key: (key[0], -len(groups[key]), key[1]))
    return [
        {
            "stage": stage,
            "reason": reason,
            "count": len(groups[stage, reason]),
            "examples": list(dict.fromkeys(row["detail"] for row in groups[stage, reason] if row["detail"]))[
                :MAX_EXAMPLES
            ],
        }
        for stage, reason in order
    ]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: ('train.beta', '1.0')."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _flat(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [(path, " · ".join(map(str, value)) or "none")]
    return [(path, "none" if value is None or value == "" else str(value))]


def _date(run: Row) -> str | None:
    started = [stage["started"] for stage in run.get("stages", {}).values() if "started" in stage]
    return datetime.fromtimestamp(min(started), UTC).strftime("%d %B %Y, %H:%M UTC") if started else None
