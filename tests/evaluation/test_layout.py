"""Reports and summaries of fleets as a browser shows them: on a phone and on a screen, light and dark."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chromium import layout, run
from PIL import Image
from test_report import evaluation_row, report_data
from test_report_content import content_data
from test_verdict import metrics_of

from vce_ray.evaluation.metrics import evaluate
from vce_ray.evaluation.report import write_report
from vce_ray.evaluation.summary import write_summary

PALETTE = Path(__file__).parents[2] / "vce_ray/evaluation/templates/palette.css"
LONG = "an_unbroken_name_" * 20


def report() -> str:
    return write_report(report_data(seen_after=3, lost=6))


def report_of_long_names() -> str:
    """A report in which everything that users and models name is one long word."""
    data = report_data()
    rows = [
        evaluation_row(arm, group, f"{LONG}{seed}", name, LONG, seed, (9, 9, 9))
        for arm, (group, name), seed in product(
            ("before", "after"), (("erase", "deer"), ("keep", LONG), ("keep", "cat")), range(6)
        )
    ]
    pair = {**data.pairs[0], "prompt": LONG, "caption": LONG, "refined_caption": f"{LONG} {LONG}"}
    reject = {"row_id": "r", "stage": LONG, "reason": LONG, "detail": LONG, "attempt": 1}
    run = {**data.run, "name": LONG, "config": {"base": LONG, LONG: LONG}}
    concept = data.concept.model_copy(update={"name": LONG})
    changes: dict[str, Any] = {"evaluation": rows, "pairs": [pair], "rejects": [reject], "run": run}
    return write_report(replace(data, concept=concept, metrics=evaluate(rows, data.concept), **changes))


def summary(name: str = "noto") -> str:
    stages = {"training": {"state": "done", "started": 1e9, "seconds": 100.0}}
    rows = [
        {"concept": name, "run": name, "fault": None, "figures": metrics, "stages": stages}
        for metrics in (metrics_of(), metrics_of(seen=(0.2, 0.1, 0.3)), metrics_of(lost=(0.01, -0.1, 0.1)))
    ]
    rows.append({"concept": name, "run": name, "fault": f"no image of {name}", "figures": None, "stages": {}})
    return write_summary({"name": name, "seconds": 1206.0, "asked": 18_432, "drawn": 4_499, "runs": rows})


def report_of_content() -> str:
    return write_report(content_data())


PAGES = {
    "report": report,
    "content": report_of_content,
    "long names": report_of_long_names,
    "fleet": summary,
    "long fleet": lambda: summary(LONG),
}


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_the_screen_and_asks_for_nothing(tmp_path: Path, page: str, width: int) -> None:
    measured = layout(PAGES[page](), tmp_path, width)
    assert measured["screen"] == width
    assert measured["beyond"] == [] and measured["page"] <= width
    assert measured["requests"] == []


@pytest.mark.browser
def test_a_page_that_does_not_fit_or_loads_something_is_noticed(tmp_path: Path) -> None:
    wide = report().replace("<main>", '<main><p style="width:500px">wide</p><img src="http://host.invalid/a.png">')
    measured = layout(wide, tmp_path, 390)
    assert measured["page"] > 390 and "wide" in measured["beyond"][0]
    assert measured["requests"] == ["http://host.invalid/a.png"]


@pytest.mark.browser
@pytest.mark.parametrize(("theme", "paper"), [("light", (250, 248, 244)), ("dark", (20, 21, 22))])
@pytest.mark.parametrize("width", [390, 1280])
def test_renders_in_a_real_browser(tmp_path: Path, width: int, theme: str, paper: tuple[int, int, int]) -> None:
    (tmp_path / "page.html").write_text(report())
    dark = ["--force-dark-mode"] if theme == "dark" else []
    shot = tmp_path / "shot.png"
    run(tmp_path, f"--window-size={width},1600", f"--screenshot={shot}", *dark, f"file://{tmp_path}/page.html")
    with Image.open(shot) as image:
        assert image.convert("RGB").getpixel((0, 0)) == paper
        drawn = {colour for _, colour in image.convert("RGB").getcolors(1 << 22) or []}
    assert len(drawn) > 50 and ((200, 90, 20) in drawn or width < 1280)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_on_every_background(theme: str) -> None:
    light, dark = PALETTE.read_text().split("@media (prefers-color-scheme:dark)")
    colours = dict(re.findall(r"--(\w+):(#\w+)", light))
    if theme == "dark":
        colours |= dict(re.findall(r"--(\w+):(#\w+)", dark))
    for text, background in product(("ink", "soft", "was", "now", "warn"), ("paper", "card", "wash", "warnwash")):
        brighter, darker = sorted((luminance(colours[text]), luminance(colours[background])), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, f"{text} on {background}"  # WCAG 2.2, 1.4.3


def luminance(colour: str) -> float:
    """Relative luminance of a colour such as #fff or #1c1917, as WCAG defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
