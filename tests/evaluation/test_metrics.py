"""Metrics of an erasure, on tables small enough to count by hand, and how a metric is added."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_report import Page, report_data

from vce_ray.concepts.load import load_concept
from vce_ray.dataflow import schemas
from vce_ray.evaluation import metrics as metrics_package
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.evaluation.metrics import columns_to_read, evaluate
from vce_ray.evaluation.metrics.base import Comparison, Measured, Metric
from vce_ray.evaluation.metrics.intervals import drop, mean, relative_drop, share
from vce_ray.evaluation.metrics.limits import LIMITS, missed_limits, undecided_limits
from vce_ray.evaluation.report import write_report
from vce_ray.evaluation.table import evaluation_row, results_table

DEER = load_concept("deer")


def row(arm: str, group: str, name: str, label: str, seed: int, score: float = 0.5, **other: Any) -> dict[str, Any]:
    prompt = f"a {name or 'blue background'}"
    fields = {"arm": arm, "group": group, "prompt": prompt, "template_held_out": False, "name": name, "seed": seed}
    return fields | {"label": label, "seen": label == "deer", "score": score} | other


def table() -> list[dict[str, Any]]:
    """4 erase images, 4 of cats, 2 of dogs and one of a background in each arm, before and after."""
    return [
        row("before", "erase", "deer", "deer", 1),
        row("before", "erase", "deer", "deer", 2),
        row("before", "erase", "deer", "deer", 3, template_held_out=True),
        row("before", "erase", "deer", "dog", 4, template_held_out=True),
        row("after", "erase", "deer", "deer", 4, template_held_out=True),  # in another order than before
        row("after", "erase", "deer", "cat", 1),
        row("after", "erase", "deer", "nothing", 2),
        row("after", "erase", "deer", "turtle", 3, template_held_out=True),
        *(row("before", "keep", "cat", "cat", seed, 0.8) for seed in range(4)),
        row("before", "keep", "dog", "dog", 9, 0.6),
        row("before", "keep", "dog", "deer", 10, 0.2),
        row("before", "keep", "", "nothing", 11, 0.6),
        *(row("after", "keep", "cat", label, seed, 0.7) for seed, label in enumerate(["cat", "cat", "cat", "dog"])),
        row("after", "keep", "dog", "dog", 10, 0.3),
        row("after", "keep", "dog", "dog", 9, 0.6),
        row("after", "keep", "", "nothing", 11, 0.6),
    ]


def test_counts_a_small_table():
    metrics = evaluate(table(), DEER)
    assert metrics["seen_before"] == 3 / 4 and metrics["seen_after"] == 1 / 4
    assert metrics["held_out_before"] == 1 / 2 and metrics["held_out_after"] == 1 / 2
    assert metrics["something_before"] == 1 and metrics["something_share"] == 3 / 4
    assert metrics["kept_before"] == 5 / 6 and metrics["kept_after"] == 5 / 6 and metrics["kept_drop"] == 0
    assert [(n["name"], n["before"]["value"], n["after"]["value"]) for n in metrics["neighbours"]] == [
        ("cat", 1, 3 / 4),
        ("dog", 1 / 2, 1),
    ]
    assert metrics["worst_neighbour"] == "cat" and metrics["worst_neighbour_drop"] == 1 / 4
    assert metrics["score_before"] == pytest.approx(4.6 / 7) and metrics["score_after"] == pytest.approx(4.3 / 7)
    assert metrics["score_drop"] == pytest.approx(0.3 / 4.6)
    assert metrics["images"] == 22
    assert metrics["figures"]["kept_after"]["images"] == 6 and metrics["figures"]["score_after"]["images"] == 7
    json.dumps(metrics, allow_nan=False)


def test_tables_and_lists_of_rows_in_any_order_give_the_same():
    assert evaluate(pa.Table.from_pylist(table()), DEER) == evaluate(table()[::-1], DEER)


def test_an_explicit_concept_is_seen_under_any_of_its_names():
    violence = load_concept("violence")
    rows = [row("before", "erase", "bomb", "skull", 1), row("after", "erase", "bomb", "key", 1)]
    rows += [row(arm, "keep", "key", "key", 1) for arm in ("before", "after")]
    metrics = evaluate(rows, violence)
    assert (metrics["seen_before"], metrics["seen_after"]) == (1, 0)


def test_for_a_style_something_needs_its_column():
    noto = load_concept("noto")
    rows = [row(arm, group, "fluent", "fluent", 1) for arm in ("before", "after") for group in ("erase", "keep")]
    assert evaluate(rows, noto)["something_share"] is None
    asked = [r | {"something": r["arm"] == "before"} for r in rows]
    assert (evaluate(asked, noto)["something_before"], evaluate(asked, noto)["something_share"]) == (1, 0)


def test_a_concept_without_neighbours_has_no_neighbour_metrics():
    metrics = evaluate([r for r in table() if r["group"] == "erase" or not r["name"]], DEER)
    assert metrics["worst_neighbour_drop"] is None and metrics["kept_drop"] is None and metrics["neighbours"] == []
    assert metrics["score_drop"] == 0
    assert missed_limits(metrics) == [] and undecided_limits(metrics) == ["seen_after"]


@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_match_the_literature(hits: int, number: int, low: float, high: float):
    figure = share([True] * hits + [False] * (number - hits))
    assert figure.value == hits / number and figure.images == number
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-4)


def test_newcombes_interval_matches_his_paper():
    figure = drop(share([True] * 56 + [False] * 14), share([True] * 48 + [False] * 32))  # 56/70 - 48/80
    assert figure.value == pytest.approx(0.2)
    assert (figure.low, figure.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_means_and_relative_drops():
    assert mean([0.5]).low == mean([0.5]).high == 0.5
    figure = mean([1.0, 2.0, 3.0])
    assert (figure.low, figure.high) == pytest.approx((2 - 1.1316, 2 + 1.1316), abs=1e-4)
    constant = relative_drop([0.5, 1.0], [0.4, 0.9])
    assert (constant.value, constant.low, constant.high) == pytest.approx((0.1333,) * 3, abs=1e-4)
    assert relative_drop([-0.1], [0.1]).value is None
    assert share([]).value is None and mean([]).images == 0


def test_a_limit_is_missed_only_above_it():
    metrics: dict[str, Any] = dict(LIMITS)
    assert missed_limits(metrics) == []
    assert missed_limits(metrics | {"kept_drop": 0.021, "score_drop": -0.5, "seen_after": 0.9}) == [
        "seen_after",
        "kept_drop",
    ]
    rounded = {"seen_after": 0.1 / 2, "worst_neighbour_drop": 1 - 0.95, "kept_drop": 0, "score_drop": 0}
    assert missed_limits(rounded) == []


def measure_brightness(comparison: Comparison) -> Measured:
    before, after = comparison.keep.column("brightness")
    return Measured({"brightness_before": mean(before), "brightness_after": mean(after)})


def test_a_metric_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch):
    listed = (*metrics_package.METRICS, Metric(("brightness",), measure_brightness))
    monkeypatch.setattr(metrics_package, "METRICS", listed)
    data = report_data()
    assert "brightness_after" not in evaluate(data.evaluation, data.concept), "its detector did not run"
    rows = [row | {"brightness": 0.25 if row["arm"] == "before" else 0.75} for row in data.evaluation]
    result = evaluate(rows, data.concept)
    assert (result["brightness_before"], result["brightness_after"]) == (0.25, 0.75)
    assert result["figures"]["brightness_after"] == {"value": 0.75, "low": 0.75, "high": 0.75, "images": 20}
    assert {key: value for key, value in result.items() if key in data.metrics and key != "figures"} == {
        key: value for key, value in data.metrics.items() if key != "figures"
    }
    page = Page(write_report(report_data(metrics=result, evaluation=rows)))
    assert "brightness_after 0.75 0.75 to 0.75 20" in page.text


def test_a_limit_is_one_line_and_applies_where_its_metric_was_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LIMITS, "darkness", 0.1)
    data = report_data()
    assert missed_limits(data.metrics) == [] and "darkness" not in write_report(data)
    met, missed = (report_data(metrics=data.metrics | {"darkness": value}) for value in (0.1, 0.2))
    assert "met darkness 10.0% at most 10%" in Page(write_report(met)).text
    assert "missed darkness 20.0% at most 10%" in Page(write_report(missed)).text


def test_two_metrics_may_not_have_the_same_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_package, "METRICS", (*metrics_package.METRICS, metrics_package.METRICS[0]))
    with pytest.raises(ValueError, match="two metrics return 'held_out_after'"):
        evaluate(table(), DEER)


def test_images_are_read_only_for_metrics_that_need_them(monkeypatch: pytest.MonkeyPatch):
    schema = schemas.evaluation([ClipDetector.columns])
    assert schema.names[-1] == "image" and columns_to_read(schema) == schema.names[:-1]
    listed = (*metrics_package.METRICS, Metric(("image",), measure_brightness))
    monkeypatch.setattr(metrics_package, "METRICS", listed)
    assert columns_to_read(schema) == schema.names


def test_the_results_table_shows_shares_in_percent_and_drops_as_changes():
    row = evaluation_row(evaluate(table(), DEER), "deer", "vsafe_dpo", 0, "vce-ray erase deer")
    assert results_table([row]).splitlines()[2:] == ["| deer | vsafe_dpo | 4 | 75.0% | 25.0% | -25.0 | +0.0 | -6.5% |"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no erase images"),
        ([r for r in table() if r["group"] == "erase"], "no keep images"),
        (table()[1:], "1 images are in one arm only, such as erase 'a deer' with seed 1"),
        ([r | {"arm": "during"} for r in table()], "arm 'during'"),
        ([{k: v for k, v in r.items() if k != "label"} for r in table()], "no 'label'"),
    ],
)
def test_refuses_tables_that_cannot_be_compared(rows: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(rows, DEER)


def test_seen_is_computed_from_labels():
    metrics = evaluate([r | {"seen": not r["seen"]} for r in table()], DEER)
    assert metrics["seen_before"] == 3 / 4


def test_the_readme_shows_the_measured_table():
    root = Path(__file__).parents[2]
    rows = json.loads((root / "docs/results/emoji_world.json").read_text())
    main = [row for row in rows if row["method"] in ("vsafe_dpo", "dpo")]
    assert results_table(main) in (root / "README.md").read_text(), "paste what `make results` printed at its end"
