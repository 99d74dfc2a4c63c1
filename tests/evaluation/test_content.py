"""What prompts ask for besides the concept: the questions to the judge, and figures that can be counted by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.evaluation.content import phrase, questions, slot_text
from vce_ray.evaluation.metrics import evaluate
from vce_ray.evaluation.metrics.intervals import paired_drop
from vce_ray.evaluation.metrics.kid import kid, kid_of_halves
from vce_ray.evaluation.metrics.limits import missed_limits, undecided_limits, worst
from vce_ray.evaluation.table import before_after_table, evaluation_row
from vce_ray.evaluation.verdict import limit_states, next_steps

DEER = load_concept("deer")
REAL = "owner/model"


def unit(angle: float) -> list[float]:
    return [float(np.cos(angle)), float(np.sin(angle))]


def erased(arm: str, seed: int, style: str | None, found: str, confidence: float = 0.9, **other: Any) -> dict[str, Any]:
    """A row of an image that was drawn for 'a deer', in a style unless it is None, and always on red."""
    row = {"arm": arm, "group": "erase", "prompt": f"a deer {seed}", "name": "deer", "seed": seed, "score": 0.5}
    row |= {"template_held_out": False, "label": "deer" if arm == "before" else "dog", "something": True}
    asked = {"background": "red"} | ({"style": style} if style else {})
    row |= {"asked": asked, "found": {"background": ["red"], "style": [found]}, "confidence": confidence}
    return row | {"refined_score": 0.4, "embedding": unit(seed)} | other


def rows() -> list[dict[str, Any]]:
    """Six images of deer in each arm, five of which name a style, and four of cats."""
    table = [
        erased("before", 0, "noto", "noto"),
        erased("before", 1, "noto", "noto"),
        erased("before", 2, "fluent", "fluent"),
        erased("before", 3, "lineart", "lineart", confidence=0.8),  # not above .8
        erased("before", 4, "lineart", "noto"),
        erased("before", 5, None, "noto", refined_score=None),
        erased("after", 0, "noto", "noto", confidence=0.999),
        erased("after", 1, "noto", "twemoji", confidence=0.3),
        erased("after", 2, "fluent", "twemoji", confidence=0.7),
        erased("after", 3, "lineart", "openmoji", confidence=0.99, something=False),
        erased("after", 4, "lineart", "lineart", confidence=0.81, refined_score=0.3),
        erased("after", 5, None, "noto", refined_score=None, confidence=0.95),
    ]
    for arm in ("before", "after"):
        for seed in range(4):
            kept = erased(arm, seed, "noto", "fluent", confidence=0.1, something=False, embedding=unit(2 + seed / 9))
            table.append(kept | {"group": "keep", "prompt": "a cat", "name": "cat", "label": "cat"})
    return table


def test_each_slot_is_a_question_among_its_values() -> None:
    asked = {question.slot: question for question in questions(DEER)}
    assert asked.keys() == {"background", "style"}
    assert asked["style"].chance == 1 / 6 and asked["background"].chance == 1 / 8
    assert asked["style"].texts[0] == "in the style of noto" and asked["background"].texts[2] == "a red background"
    real = {question.slot: question.texts for question in questions(load_concept("nudity", REAL))}
    assert real.keys() == {"medium", "person", "place"}
    assert real["medium"][3] == "an oil painting" and real["place"][0] == "in a park" and real["person"][0] == "a woman"
    assert questions(load_concept("van_gogh", REAL))[0].texts[3] == "an old man"


def test_values_that_are_phrases_take_no_article() -> None:
    assert slot_text("style", "noto") == "in the style of noto"
    assert [phrase(text) for text in ("a church", "at sunset", "An old man", "owl", "inside")] == [
        "a church", "at sunset", "An old man", "an owl", "inside"
    ]  # fmt: skip


def test_of_two_objects_at_once_the_other_may_be_among_the_two_best() -> None:
    scene = with_second_object()
    question = {question.slot: question for question in questions(scene)}["object"]
    assert question.choices == ("house", "tree", "deer") and question.at_once == 2 and question.chance == 2 / 3
    found = (["deer", "house"], ["house", "deer"], ["tree", "deer"], ["tree", "house"])
    table = [
        row | {"asked": {"object": "house"}, "found": {"object": best}}
        for row, best in zip(rows()[:2] + rows()[6:8], found, strict=True)
    ]
    metrics = evaluate([*table, *rows()[12:]], scene)
    assert metrics["asked_object_before"] == 1 and metrics["asked_object_after"] == 1 / 2
    style = load_concept("openmoji")
    assert {q.slot: q.at_once for q in questions(style)} == {"background": 1, "object": 1}, "the one object of a style"


def with_second_object() -> Concept:
    return Concept(
        name="deer", kind="object", names=("deer",), templates=("a {name} and a {object}",), keep=("cat",),
        slots={"object": ("house", "tree")}, labels=("deer", "cat", "house", "tree"),
    )  # fmt: skip


def test_a_slot_without_a_choice_is_no_question() -> None:
    only = DEER.model_copy(update={"slots": {"style": ("noto",), "background": ("red", "blue")}})
    assert [question.slot for question in questions(only)] == ["background"]


def test_counts_what_else_was_asked_for_in_erase_prompts_that_name_it() -> None:
    metrics = evaluate(rows(), DEER)
    assert metrics["asked_style_before"] == 4 / 5 and metrics["asked_style_after"] == 2 / 5
    assert metrics["asked_style_drop"] == pytest.approx(2 / 5)
    assert metrics["asked_background_before"] == metrics["asked_background_after"] == 1
    assert metrics["figures"]["asked_style_after"]["images"] == 5
    assert metrics["figures"]["asked_background_after"]["images"] == 6
    assert [(slot["name"], slot["choices"], slot["chance"]) for slot in metrics["asked"]] == [
        ("style", 6, 1 / 6),
        ("background", 8, 1 / 8),
    ]
    assert metrics["asked"][0]["drop"] == metrics["figures"]["asked_style_drop"]
    assert metrics["worst_asked"] == "style" and metrics["worst_asked_drop"] == pytest.approx(2 / 5)
    json.dumps(metrics, allow_nan=False)


def test_an_image_of_nothing_is_unclear_however_sure_the_judge_is() -> None:
    metrics = evaluate(rows(), DEER)
    assert metrics["unclear_before"] == 1 / 6 and metrics["unclear_after"] == 3 / 6
    assert metrics["unclear_drop"] == pytest.approx(-2 / 6)
    shares = {row["name"]: (row["before"], row["after"]) for row in metrics["confidence"]}
    assert shares == {
        "nothing": (0, 1 / 6),
        "0 to 0.5": (0, 1 / 6),
        "0.5 to 0.8": (1 / 6, 1 / 6),
        "0.8 to 0.95": (5 / 6, 2 / 6),
        "0.95 to 0.99": (0, 0),
        "0.99 to 1": (0, 1 / 6),
    }


def test_the_refined_score_is_that_of_prompts_with_something_left() -> None:
    metrics = evaluate(rows(), DEER)
    assert metrics["refined_score_before"] == pytest.approx(0.4) and metrics["refined_score_after"] == pytest.approx(
        0.38
    )
    assert metrics["refined_score_drop"] == pytest.approx(0.02 / 0.4)
    assert metrics["figures"]["refined_score_after"]["images"] == 5


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # both, before only, after only, neither. Published: Altman et al., Statistics with Confidence (2000), p. 52;
        # Fagerland et al., Statistical Analysis of Contingency Tables (2017), chapter 8
        ((14, 5, 0, 22), 0.011, 0.226),
        ((1, 1, 7, 12), -0.507, -0.026),
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_paired_intervals_match_the_literature(table: tuple[int, int, int, int], low: float, high: float) -> None:
    both, first, second, neither = table
    before = [True] * (both + first) + [False] * (second + neither)
    after = [True] * both + [False] * first + [True] * second + [False] * neither
    figure = paired_drop(before, after)
    assert figure.value == pytest.approx((first - second) / sum(table))
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=6e-4)


def test_paired_intervals_of_the_same_images_are_narrower_and_defined_at_the_ends() -> None:
    same = [True] * 40 + [False] * 60
    figure = paired_drop(same, same)
    assert figure.value == 0 and figure.high is not None and figure.high < 0.05
    assert paired_drop([True] * 20, [True] * 20).value == 0
    assert paired_drop([], []).value is None


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD by loops, in the published form: features of length sqrt(d), kernel (x.y/d + 1)^3."""
    d = x.shape[1]
    x, y = (features * np.sqrt(d) for features in (x, y))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / d + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def embeddings(number: int, seed: int, shift: float = 0.0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(number, 8)) + shift
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_kid_is_the_published_estimate() -> None:
    x, y = embeddings(30, 0), embeddings(47, 1, shift=1.0)
    figure = kid(x, y, np.random.default_rng(0))
    assert figure.value == pytest.approx(loop_mmd(x, y)) and figure.images == 30
    assert figure.low is not None and figure.high is not None and 0 < figure.low < figure.high


def test_kid_of_one_distribution_is_0_within_its_interval_and_its_floor() -> None:
    within = 0
    for seed in range(20):
        figure = kid(embeddings(60, seed), embeddings(60, 100 + seed), np.random.default_rng(0))
        assert figure.low is not None and figure.high is not None
        within += figure.low <= 0 <= figure.high
    assert within >= 18
    floor = kid_of_halves(embeddings(120, 7), 60, np.random.default_rng(0))
    assert floor.low is not None and floor.high is not None and floor.low < 0 < floor.high and floor.images == 120
    far = kid(embeddings(60, 0), embeddings(60, 1, shift=0.5), np.random.default_rng(0))
    assert far.low is not None and far.low > floor.high


def test_kid_compares_erase_prompts_with_what_the_base_draws_of_what_is_kept() -> None:
    metrics = evaluate(rows(), DEER)
    kept = np.array([unit(2 + seed / 9) for seed in range(4)])
    deer = np.array([unit(seed) for seed in range(6)])
    assert metrics["kid_before"] == metrics["kid_after"] == pytest.approx(loop_mmd(deer, kept))
    assert metrics["figures"]["kid_floor"]["images"] == 4
    assert evaluate(rows()[:2] + rows()[6:8] + rows()[12:], DEER)["kid_after"] is None, "two images are too few"


def test_they_are_limits_of_the_verdict() -> None:
    metrics = evaluate(rows() + more(200), DEER)
    assert missed_limits(metrics) == ["worst_asked_drop", "unclear_after"]
    assert worst("worst_asked_drop", metrics) == "style"
    states = {state.name: state for state in limit_states(metrics)}
    assert states["worst_asked_drop"].worst == "style" and states["worst_asked_drop"].bound == "at most 5 points lost"
    assert states["unclear_after"].bound == "at most 10%"
    assert any("in place of the concept lost too much of the prompt" in step for step in next_steps(metrics))


def more(number: int, style_right: bool = False, confidence: float = 0.5) -> list[dict[str, Any]]:
    seeds = range(100, 100 + number)
    before = [erased("before", seed, "noto", "noto") for seed in seeds]
    found = "noto" if style_right else "fluent"
    return before + [erased("after", seed, "noto", found, confidence) for seed in seeds]


def test_few_images_leave_them_undecided_and_say_how_many_decide() -> None:
    metrics = evaluate(more(12, style_right=True, confidence=0.95) + rows()[12:], DEER)
    assert undecided_limits(metrics)[-2:] == ["worst_asked_drop", "unclear_after"] and not missed_limits(metrics)
    [step] = next_steps(metrics)
    assert "erase again with --judged " in step and "--judged-keep" in step


def test_no_limit_on_clear_objects_where_the_judge_is_unsure_of_the_base() -> None:
    unsure = [row | {"confidence": 0.5} for row in rows() + more(200)]
    metrics = evaluate(unsure, DEER)
    assert metrics["unclear_before"] == 1
    assert "unclear_after" not in missed_limits(metrics) + undecided_limits(metrics)
    assert "unclear_after" not in {state.name for state in limit_states(metrics)}


def test_prompts_that_name_nothing_else_have_no_such_figures() -> None:
    bare = [row | {"asked": None} for row in rows()]
    metrics = evaluate(bare, DEER)
    assert metrics["asked"] == [] and metrics["worst_asked"] is None and metrics["worst_asked_drop"] is None
    assert "worst_asked_drop" not in {state.name for state in limit_states(metrics)}


def test_tables_show_them() -> None:
    metrics = evaluate(rows(), DEER)
    lines = [" ".join(line.split()) for line in before_after_table(metrics).splitlines()]
    assert "asked style drawn 80.0% 40.0%" in lines and "asked background drawn 100.0% 100.0%" in lines
    assert "no clear object 16.7% 50.0%" in lines and "score without the concept 0.400 0.380" in lines
    row = evaluation_row(metrics, "deer", "vsafe_dpo", 0, "command")
    assert row["asked_style_before"] == 4 / 5 and row["asked_style_drop"] == pytest.approx(2 / 5)
    assert (
        row["unclear_after"] == 1 / 2 and {"kid_before", "kid_after", "kid_floor", "refined_score_drop"} <= row.keys()
    )
