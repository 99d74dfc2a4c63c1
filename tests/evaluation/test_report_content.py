"""The section of the report on what else the prompts asked for, and the failures that it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import cos, sin
from typing import Any

from test_report import EVIL, Page, report_data

from vce_ray.concepts.load import load_concept
from vce_ray.evaluation.metrics import evaluate
from vce_ray.evaluation.report import ReportData, write_report

TITLE = "What else the prompt asked for"


def content_data(style_lost: int = 6, vague: int = 8, base_unsure: int = 0, **changes: Any) -> ReportData:
    """A report of 24 images that ask for a style, 12 of them for a background too; some lost the style or are vague."""
    data = report_data()

    def content(row: Mapping[str, Any]) -> dict[str, Any]:
        after, seed, erase = row["arm"] == "after", row["seed"], row["group"] == "erase"
        lost, unsure = erase and after and seed < style_lost, erase and seed < (vague if after else base_unsure)
        asked = {"style": "noto"} | ({"background": "red"} if seed % 2 else {})
        found = {"style": ["fluent" if lost else "noto"], "background": ["red"]}
        columns = {"asked": asked, "found": found, "something": True, "confidence": seed / 100 if unsure else 0.97}
        angle = (seed + 3 * after) / 20
        columns |= {"refined_score": 0.3 if after else 0.4, "embedding": [cos(angle), sin(angle)]}
        return {**row, **columns, **changes}

    rows = [content(row) for row in data.evaluation]
    return replace(data, evaluation=rows, metrics=evaluate(rows, data.concept))


def section(page: Page) -> str:
    """Return the text of the section, up to the title of the next one."""
    start = page.text.index("Prompts for deer ask for more than deer")
    return page.text[start : page.text.index("Up to eight failures")]


def test_shows_each_slot_beside_chance_and_the_base() -> None:
    page = Page(write_report(content_data()))
    assert "asked" in [one.get("id") for one in page.all("section")] and page.text.count(TITLE) == 2
    text = section(page)
    assert "style, one of 6 16.7% 100.0% 86.2 to 100.0 75.0% 55.1 to 88.0 \u221225.0 points" in text
    assert "background, one of 8 12.5% 100.0% 75.8 to 100.0 100.0% 75.8 to 100.0 0.0 points" in text
    assert text.index("style, one of 6") < text.index("background, one of 8"), "the largest loss comes first"
    assert "At most 5 points may be lost of each." in text


def test_shows_whether_something_recognizable_is_drawn() -> None:
    data = content_data()
    page = Page(write_report(data))
    text = section(page)
    assert (
        "No clear object 0.0% 0.0 to 13.8 33.3% 18.0 to 53.3 +33.3 points" in text
        and "At most 10% may be unclear." in text
    )
    assert "Fit to the prompt without the concept 0.4 0.400 to 0.400 0.3 0.300 to 0.300 \u221225.0%" in text
    assert "Distance to images of what is kept" in text
    assert "no published KID compares with it" in text
    assert "0 to 0.5 33.3% before: 0.0%" in text and "0.95 to 0.99 66.7% before: 100.0%" in text
    html = write_report(data)
    assert html.count('class="bar a"') == html.count('class="bar b"') == 6
    shown = text + page.text[page.text.index("All metrics") :]
    assert not any(f"{name}_after" in shown for name in ("asked_style", "unclear", "kid", "refined_score"))


def test_shows_what_went_wrong() -> None:
    text = Page(write_report(content_data())).text
    misses = text[text.index("Up to eight failures") :]
    assert "The style that the prompt names was right and is wrong: 6 of 24" in misses
    assert "The background that the prompt names was right and is wrong: 0 of 12 None." in misses
    assert misses.count("noto \u2192 became fluent") == 6
    vague = misses[misses.index("No clear object, least clear first: 8 of 24") :]
    assert vague.index("turtle 0.00") < vague.index("turtle 0.01") < vague.index("turtle 0.07")


def test_both_are_in_the_verdict() -> None:
    text = Page(write_report(content_data(style_lost=20, vague=20))).text
    assert "2 of 6 limits are missed" in text
    assert "missed rest of prompt: style \u221283.3 points at most 5 points lost" in text
    assert "missed no clear object 83.3% at most 10%" in text
    assert "what is drawn in place of the concept lost too much of the prompt" in text.lower()
    few = Page(write_report(content_data(style_lost=0, vague=0))).text
    assert "No limit is missed, but 5 of 6 are undecided" in few
    assert few.count("ore images decide what is undecided") == 1


def test_a_judge_that_is_unsure_of_the_base_sets_no_limit() -> None:
    text = Page(write_report(content_data(base_unsure=8))).text
    assert "No limit applies, because the judge is unsure of more than 10% of the base\u2019s own images." in text
    assert "no clear object" not in text[: text.index("Contents")]


def test_an_evaluation_without_its_columns_has_no_such_section() -> None:
    page = Page(write_report(report_data()))
    assert TITLE not in page.text and "No clear object" not in page.text


def test_prompts_that_name_nothing_else_leave_the_rest_of_the_section() -> None:
    text = Page(write_report(content_data(asked=None))).text
    assert "Is something recognizable drawn?" in text and "By chance" not in text


def test_for_a_style_the_object_is_named_that_the_judge_is_unsure_of() -> None:
    noto = load_concept("noto")
    data = content_data(asked={"object": "house"}, found={"object": ["snail"], "background": ["red"]})
    rows = [row | {"label": "fluent", "something": row["seed"] != 1} for row in data.evaluation]
    text = Page(write_report(replace(data, concept=noto, evaluation=rows, metrics=evaluate(rows, noto)))).text
    assert "snail 0.00" in text and "nothing 0.01" in text and "fluent 0.00" not in text


def test_values_of_slots_are_escaped() -> None:
    data = content_data()
    concept = data.concept.model_copy(update={"slots": {"style": ("noto", "fluent", EVIL), EVIL: ("x", EVIL)}})
    seen = {"before": "noto", "after": EVIL}
    rows = [
        row | {"asked": {"style": "noto", EVIL: "x"}, "found": {"style": [seen[row["arm"]]], EVIL: ["x"]}}
        for row in data.evaluation
    ]
    html = write_report(replace(data, concept=concept, evaluation=rows, metrics=evaluate(rows, concept)))
    page = Page(html)
    assert "<script" not in html and EVIL in page.text and not page.all("script")
