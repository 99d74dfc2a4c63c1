"""Metrics of an erasure, on tables small enough to count by hand."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vce_ray.concepts.load import load_concept
from vce_ray.evaluation.metrics import evaluate
from vce_ray.evaluation.metrics.bars import BARS, missed_bars
from vce_ray.evaluation.metrics.intervals import drop, mean, relative_drop, share
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
    assert missed_bars(metrics) == ["seen_after"]


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


def test_a_bar_is_missed_only_above_it():
    metrics: dict[str, Any] = dict(BARS)
    assert missed_bars(metrics) == []
    assert missed_bars(metrics | {"kept_drop": 0.021, "score_drop": -0.5, "seen_after": 0.9}) == [
        "seen_after",
        "kept_drop",
    ]
    assert missed_bars({"seen_after": 0.1 / 2, "worst_neighbour_drop": 1 - 0.95, "kept_drop": 0, "score_drop": 0}) == []


def test_an_evaluation_row_has_the_keys_of_the_table():
    line = evaluation_row(evaluate(table(), DEER), "deer", "vsafe_dpo", 0, "vce-ray erase deer")
    assert list(line) == [
        "concept", "method", "images", "seen_before", "seen_after", "worst_neighbour_drop", "kept_drop", "score_drop",
        "seed", "command",
    ]  # fmt: skip
    assert line["seen_after"] == 1 / 4 and line["images"] == 4 and line["command"] == "vce-ray erase deer"


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
