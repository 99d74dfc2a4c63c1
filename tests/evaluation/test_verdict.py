"""The verdict that a command prints: met, missed or undecided, and the next step."""

from __future__ import annotations

from typing import Any

import pytest
from test_report import report_data

from vce_ray.evaluation.metrics.limits import LIMITS, missed_limits, undecided_limits
from vce_ray.evaluation.report import write_report
from vce_ray.evaluation.summary import summary_table, write_summary
from vce_ray.evaluation.verdict import verdict_lines


def metrics_of(
    seen: tuple[float, float, float] = (0.01, 0.0, 0.04),
    lost: tuple[float, float, float] = (0.0, -0.01, 0.01),
    seen_before: float = 0.9,
    style_lost: tuple[float, float, float] = (0.0, -0.01, 0.01),
    unclear: tuple[float, float, float] = (0.02, 0.01, 0.04),
) -> dict[str, Any]:
    """Metrics whose figures are given as (value, low, high)."""
    figures = {"seen_before": (seen_before, seen_before - 0.05, seen_before + 0.05), "seen_after": seen}
    figures |= {"kept_drop": lost, "score_drop": lost, "unclear_before": (0.01, 0.0, 0.02), "unclear_after": unclear}
    neighbours = [{"name": name, "drop": figure(*lost)} for name in ("fox", "cat")]
    values = {name: value for name, (value, _, _) in figures.items()}
    return values | {
        "worst_neighbour": "fox",
        "worst_neighbour_drop": lost[0],
        "neighbours": neighbours,
        "worst_asked": "style",
        "worst_asked_drop": style_lost[0],
        "asked": [{"name": "style", "drop": figure(*style_lost)}],
        "figures": {name: figure(*of) for name, of in figures.items()},
    }


def figure(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "images": 100}


@pytest.mark.parametrize(
    ("metrics", "states", "steps"),
    [
        (metrics_of(), ["met"] * 6, ["every limit is met"]),
        (metrics_of(seen=(0.05, 0.02, 0.05)), ["met"] * 6, ["every limit is met"]),  # equal to the limit
        (metrics_of(seen=(0.0, 0.0, 0.08)), ["undecided", *["met"] * 5], ["erase again with --judged 300, --pairs-of"]),
        (metrics_of(seen=(0.2, 0.1, 0.3)), ["missed", *["met"] * 5], ["too much of the concept is left"]),
        (metrics_of(seen=(0.9, 0.8, 0.95)), ["missed", *["met"] * 5], ["do not show that anything was erased"]),
        (metrics_of(lost=(0.3, 0.1, 0.5)), ["met", *["missed"] * 3, *["met"] * 2], ["too much else was lost"]),
        (
            metrics_of(lost=(0.01, -0.1, 0.1)),
            ["met", *["undecided"] * 3, *["met"] * 2],
            ["with --judged-keep 8100, --pairs-of"],
        ),
        (
            metrics_of((0.04, 0.01, 0.1), (0.03, -0.1, 0.1)),
            [*["undecided"] * 4, *["met"] * 2],
            ["with --judged 3600 and --judged-keep 17000, --pairs-of"],
        ),
        (
            metrics_of((0.2, 0.1, 0.3), (0.3, 0.1, 0.5)),
            [*["missed"] * 4, *["met"] * 2],
            ["is left and too much else was lost"],
        ),
        (metrics_of(seen_before=0.02), ["met"] * 6, ["the base draws the concept in 2.0%"]),
        (
            metrics_of(style_lost=(0.2, 0.1, 0.3)),
            [*["met"] * 4, "missed", "met"],
            ["in place of the concept lost too much of the prompt"],
        ),
        (
            metrics_of(lost=(0.3, 0.1, 0.5), unclear=(0.3, 0.2, 0.4)),
            ["met", *["missed"] * 3, "met", "missed"],
            ["too much else was lost", "in place of the concept lost too much of the prompt"],
        ),
        (
            metrics_of(style_lost=(0.01, -0.07, 0.09), unclear=(0.06, 0.0, 0.2)),
            [*["met"] * 4, *["undecided"] * 2],
            ["with --judged 1300, --pairs-of"],
        ),
    ],
)
def test_states_and_next_steps(metrics: dict[str, Any], states: list[str], steps: list[str]) -> None:
    lines = verdict_lines(metrics)
    assert [line.split()[0] for line in lines[: len(LIMITS)]] == states
    found = lines[len(LIMITS) :]
    assert len(found) == len(steps) and all(step in line for step, line in zip(steps, found, strict=True))
    assert [name for name, state in zip(LIMITS, states, strict=True) if state == "missed"] == missed_limits(metrics)


def test_every_neighbour_counts_for_the_worst() -> None:
    metrics = metrics_of()
    metrics["neighbours"][1]["drop"] = figure(-0.01, -0.1, 0.06)  # lost nothing, but judged on few images
    assert undecided_limits(metrics) == ["worst_neighbour_drop"]
    assert "worst neighbour     0.0 points" in verdict_lines(metrics)[1]
    assert verdict_lines(metrics)[1].endswith("95% interval \u22126.0 to +10.0 (cat)")


def test_drops_are_shown_as_changes() -> None:
    line = verdict_lines(metrics_of(lost=(-0.008, -0.023, 0.005)))[2]
    words = "met all neighbours +0.8 points at most 2 points lost 95% interval \u22120.5 to +2.3"
    assert " ".join(line.split()) == words


def test_what_was_not_measured_has_no_state() -> None:
    metrics = metrics_of() | {"worst_neighbour_drop": None, "neighbours": [], "kept_drop": None}
    metrics["figures"]["kept_drop"] = {"value": None, "low": None, "high": None, "images": 0}
    assert [line.split()[1] for line in verdict_lines(metrics)[:2]] == ["concept", "image-text"]
    assert undecided_limits(metrics) == []


def test_a_report_and_a_fleet_say_the_same() -> None:
    data = report_data()  # 24 images of the concept and 10 of each neighbour: too few for any share
    assert undecided_limits(data.metrics) == ["seen_after", "worst_neighbour_drop", "kept_drop"]
    page = write_report(data)
    assert page.count('undecided">undecided</strong>') == 3 and "No limit is missed, but 3 of 4 are undecided" in page
    run = {"concept": "deer", "run": "deer", "fault": None, "figures": data.metrics, "stages": {}}
    fleet = {"name": "fleet", "seconds": 1, "asked": 1, "drawn": 1, "runs": [run]}
    assert "undecided: concept seen, worst neighbour, all neighbours" in summary_table(fleet)
    assert "undecided: concept seen, worst neighbour, all neighbours" in write_summary(fleet)
    assert "<strong>0</strong> met all limits" in write_summary(fleet)
