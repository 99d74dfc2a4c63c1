"""The report page and the README's before/after sheet, from small synthetic data."""

import io
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vce_ray.concepts.load import load_concept
from vce_ray.evaluation.charts import Change, Series, change_charts, line_chart, nice_ticks
from vce_ray.evaluation.formats import NO_VALUE, change, change_interval, duration, interval, percent, points
from vce_ray.evaluation.images import before_after_png, data_uri, pair_images, sample
from vce_ray.evaluation.metrics import evaluate
from vce_ray.evaluation.report import SECTIONS, ReportData, write_report
from vce_ray.training.objectives.base import Curve
from vce_ray.training.objectives.vsafe_dpo import VSafeDPO

DEER = load_concept("deer")
EVIL = "<script>alert('deer')</script>\"><img src=x onerror=alert(1)>"
ELSEWHERE = {"asked"}
"""Sections that these data have no columns for: test_report_content.py."""
VOID = {"meta", "img", "line", "polyline", "circle", "input", "br", "link"}


def png(colour: tuple[int, int, int], edge: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (edge, edge), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def report_data(seen_after: int = 0, lost: int = 0, **changes: Any) -> ReportData:
    """24 erase images and 10 of each of two neighbours in each arm; `seen_after` deer still seen, `lost` foxes lost."""
    rows = []
    for arm, colour in (("before", (200, 90, 20)), ("after", (20, 120, 110))):
        for seed in range(24):
            label = "deer" if arm == "before" or seed < seen_after else "turtle"
            rows.append(evaluation_row(arm, "erase", f"a deer on plate {seed}", "deer", label, seed, colour))
        for name in ("fox", "cat"):
            for seed in range(10):
                label = "nothing" if arm == "after" and name == "fox" and seed < lost else name
                rows.append(evaluation_row(arm, "keep", f"a {name} on plate {seed}", name, label, seed, colour))
    pair = {
        "prompt": "a deer",
        "caption": "a deer on a red background",
        "refined_caption": "an animal on a red background",
        "rejected_image": png((1, 2, 3)),
        "chosen_image": png((3, 2, 1)),
    }
    steps = [
        {"step": n, "loss": 1 / n, "margin": n / 2, "accuracy": 1.0, "chosen_ratio": 0.01, "rejected_ratio": -n / 2}
        | {"preservation": 0.01, "gradient_norm": 1.0}
        for n in range(1, 21)
    ]
    reject = {"row_id": "r", "stage": "safe", "reason": "concept in safe image", "detail": "a deer", "attempt": 3}
    run = {"name": "deer-vsafe-dpo-0", "config": {"base": "emoji-world", "seed": 0, "train": {"beta": 1.0}}}
    run |= {
        "versions": {"torch": "2.13"},
        "git": None,
        "stages": {
            "unsafe": {"state": "done", "started": 1e9, "rows": 30, "seconds": 60.0},
            "pairs": {"state": "done", "started": 1e9, "rows": 3, "seconds": 60.5},
            "training": {"state": "done", "started": 1e9 + 80, "seconds": 100.0},
            "report": {"state": "running", "started": 1e9 + 3723},
        },
    }
    data = ReportData(run, DEER, evaluate(rows, DEER), rows, [pair], steps, [reject, reject | {"detail": "two deer"}])
    data = replace(data, curves=VSafeDPO.curves)
    return replace(data, **changes)


def evaluation_row(
    arm: str, group: str, prompt: str, name: str, label: str, seed: int, colour: tuple[int, int, int]
) -> dict[str, Any]:
    row = {"arm": arm, "group": group, "prompt": prompt, "template_held_out": seed % 2 == 0, "name": name}
    return row | {"seed": seed, "label": label, "seen": label == "deer", "score": 0.3, "image": png(colour)}


class Page(HTMLParser):
    """Parses a page, keeps its tags and text, and fails on tags that are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_shows_all_sections_and_loads_nothing_external():
    page = Page(write_report(report_data()))
    assert all(title in page.text for section, title in SECTIONS.items() if section not in ELSEWHERE)
    assert "concept in safe image 2" in page.text and "two deer" in page.text
    assert "train.beta 1.0" in page.text and "torch 2.13" in page.text
    images = page.all("img")
    assert len(images) == 2 * 8 + 2 * 8 + 2  # two strips and a pair
    assert all((image["src"] or "").startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert len(curves_of(page)) == 6
    assert not page.all("script") and not page.all("link")
    assert not [attrs for _, attrs in page.tags for name in attrs if name == "srcset" or name.startswith("on")]
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))


def curves_of(page: Page) -> list[str]:
    """What screen readers say of the charts that they do not skip."""
    return [svg["aria-label"] or "" for svg in page.all("svg") if "aria-hidden" not in svg]


def test_the_contents_list_every_section():
    html = write_report(report_data())
    page = Page(html)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = [(link["href"] or "").removeprefix("#") for link in page.all("a")]
    assert set(links) <= set(ids)
    assert [name for name in links if name != "contents"] == [s["id"] for s in page.all("section") if "id" in s]
    few = Page(write_report(report_data(pairs=(), training=(), run={})))
    assert {"#pairs", "#curves", "#times"}.isdisjoint(link["href"] for link in few.all("a"))
    assert set(SECTIONS) - {"pairs", "curves", "times"} - ELSEWHERE == {
        s["id"] for s in few.all("section") if "id" in s
    }


def test_no_level_of_headings_is_skipped():
    for html in (write_report(report_data()), write_report(report_data(pairs=(), training=(), run={}))):
        levels = [int(tag[1]) for tag, _ in Page(html).tags if tag in ("h1", "h2", "h3", "h4")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(lower - upper <= 1 for upper, lower in pairwise(levels))


def test_begins_with_the_verdict_and_what_to_do_next():
    text = Page(write_report(report_data())).text
    assert "No limit is missed, but 3 of 4 are undecided" in text
    assert "undecided concept seen 0.0% at most 5%; 95% interval 0.0 to 13.8%" in text
    assert "worst neighbour: cat 0.0 points at most 5 points lost; 95% interval \u221227.8 to +27.8 points" in text
    assert "met image-text score 0.0% at most 2% lost; 95% interval 0.0 to 0.0%" in text
    step = "More images decide what is undecided: erase again with --judged"
    assert text.index("What to do next") < text.lower().index(step.lower()) < text.index("Contents")


def test_says_how_long_the_run_and_its_stages_took():
    page = Page(write_report(report_data()))
    assert "09 September 2001, 01:46 UTC, took 1 h 2 min" in page.text
    assert "took 1 h 2 min from its first stage to this report, and stages were at work for 2 min 40 s" in page.text
    assert "unsafe 0.0 s 1 min 0 s 30 pairs 0.0 s 1 min 0 s 3 training 1 min 20 s 1 min 40 s" in page.text


def test_shows_how_each_neighbour_changed_worst_first():
    html = write_report(report_data(lost=6))
    text = Page(html).text
    section = text[text.index("How the share of images in which") :]
    assert "5 points lost by one neighbour, 2 points by all together" in section
    together, fox, cat = (section.index(name) for name in ("all together \u221230.0", "fox \u221260.0", "cat 0.0"))
    assert together < fox < cat
    assert "missed , \u221283.2 to \u221220.1; 100.0% \u2192 before, 40.0% after of 10 images" in section
    assert html.count('class="plot"') == 3
    assert 'class="plot"' not in write_report(without_neighbours())


def without_neighbours() -> ReportData:
    data = report_data()
    rows = [row for row in data.evaluation if row["group"] == "erase"]
    rows += [row | {"name": ""} for row in data.evaluation if row["group"] == "keep"]
    return replace(data, evaluation=rows, metrics=evaluate(rows, DEER))


def test_tables_scroll_by_keyboard():
    html = write_report(report_data())
    assert html.count("<table>") == html.count('<div class="scroll" tabindex="0" role="region" aria-label=') == 3


def test_settings_are_collapsed():
    details = Page(write_report(report_data())).all("details")
    assert len(details) == 3 and not any("open" in attrs for attrs in details)


def test_untrusted_text_is_escaped_everywhere():
    data = report_data()
    rows = [row | {"prompt": EVIL, "label": EVIL if row["arm"] == "after" else row["label"]} for row in data.evaluation]
    pair = {**data.pairs[0], "prompt": EVIL, "caption": f"a deer {EVIL}", "refined_caption": f"an animal {EVIL}"}
    reject = {"row_id": "r", "stage": EVIL, "reason": EVIL, "detail": EVIL, "attempt": 1}
    run = {**data.run, "name": EVIL, "config": {"base": EVIL, EVIL: EVIL}}
    metrics = evaluate(rows, DEER)
    html = write_report(replace(data, run=run, evaluation=rows, metrics=metrics, pairs=[pair], rejects=[reject]))
    page = Page(html)
    assert not page.all("script") and "<script" not in html
    assert all((image["src"] or "").startswith("data:") and "onerror" not in image for image in page.all("img"))
    assert EVIL in page.text


def test_marks_words_that_refining_removed_and_added():
    html = write_report(report_data())
    assert "<del>a deer</del> on a red background" in html
    assert "<ins>an animal</ins> on a red background" in html


def test_warns_of_every_missed_limit():
    data = report_data(seen_after=12, lost=6)
    page = Page(write_report(data))
    assert "Do not rely on this erasure: 3 of 4 limits are missed" in page.text
    for limit in (
        "missed concept seen 50.0% at most 5%;",
        "missed worst neighbour: fox \u221260.0 points at most 5 points lost;",
        "missed all neighbours \u221230.0 points at most 2 points lost;",
    ):
        assert limit in page.text
    assert "too much of the concept is left and too much else was lost" in page.text.lower()
    assert "The concept is still seen: 12 of 24" in page.text and "no longer recognized: 6 of 20" in page.text


def test_warns_of_a_collapsed_training():
    falling = [{"step": n, "margin": n / 10, "chosen_ratio": -n / 1, "rejected_ratio": -1.1 * n} for n in range(1, 21)]
    page = Page(write_report(report_data(training=falling)))
    assert "Do not rely on this erasure: the training collapsed" in page.text and "train for fewer --steps" in page.text
    assert len(curves_of(page)) == 2  # those whose metrics were logged
    missed = Page(write_report(report_data(seen_after=12, training=falling)))
    assert "Do not rely on this erasure: the training collapsed and 1 of 4 limits is missed" in missed.text


def test_accepts_a_run_with_nothing_but_metrics():
    page = Page(write_report(replace(without_neighbours(), pairs=(), training=(), rejects=(), run={})))
    assert "Nothing was rejected" in page.text and "no neighbours were drawn" in page.text


def test_unsafe_images_of_real_models_are_veiled():
    violence = load_concept("violence")
    data = report_data()
    metrics = evaluate(data.evaluation, violence)
    real = replace(data, concept=violence, metrics=metrics, run={"config": {"base": "owner/model"}})
    assert [box["id"] for box in Page(write_report(real)).all("input")] == ["unveil"]
    assert not Page(write_report(replace(data, concept=violence, metrics=metrics))).all("input")


def test_examples_take_turns_among_the_names():
    rows = list(report_data().evaluation)
    shown = sample(pair_images(rows, "keep"), 8)
    assert sorted(one.before["name"] for one in shown) == ["cat"] * 4 + ["fox"] * 4
    assert shown == sample(pair_images(rows[::-1], "keep"), 8)
    assert all(one.before["prompt"] == one.after["prompt"] for one in shown)
    assert sample([], 8) == []


def test_large_images_are_scaled_down_and_broken_ones_refused():
    assert len(data_uri(png((9, 9, 9), 800))) < 1200
    with pytest.raises(ValueError, match="7 bytes cannot be read"):
        data_uri(b"no more")


def test_before_after_sheet(tmp_path: Path):
    before_after_png(report_data().evaluation, tmp_path / "sheet.png", columns=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 144 and sheet.height > 4 * 144
        colours = {colour for _, colour in sheet.getcolors(1 << 20) or []}
    assert {(200, 90, 20), (20, 120, 110)} <= colours
    with pytest.raises(ValueError, match="nothing to show"):
        before_after_png([], tmp_path / "none.png")


def test_curves_come_from_the_report_data():
    curve = Curve("Reward", (("reward", "mean of the batch"),), "It <rises>.")
    training = [{"step": n, "reward": n / 5} for n in range(1, 6)]
    page = Page(write_report(report_data(training=training, curves=[curve])))
    assert curves_of(page) == ["Reward: mean of the batch from 0.2 to 1"]
    assert "It <rises>. mean of the batch, last value 1" in page.text


def test_number_formats():
    assert percent(0.0123) == "1.2%" and percent(None) == NO_VALUE and percent(-0.5) == "\u221250.0%"
    assert points(0.012) == "\u22121.2 points" and points(-0.012) == "+1.2 points" and points(0.0) == "0.0 points"
    assert points(-1e-9) == "0.0 points" and change(0.02) == "\u22122.0%"
    assert interval({"value": 0.5, "low": -0.01, "high": 0.75}) == "\u22121.0 to 75.0"
    assert change_interval({"value": 0.01, "low": -0.005, "high": 0.027}) == "\u22122.7 to +0.5"
    assert [duration(seconds) for seconds in (0, 28.94, 59.96, 166, 3600, 11_159.9)] == [
        "0.0 s", "28.9 s", "1 min 0 s", "2 min 46 s", "1 h 0 min", "3 h 6 min"
    ]  # fmt: skip


def test_charts_accept_flat_lines_single_steps_and_broken_values():
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(-3.2, 0.4) == [-4, -3, -2, -1, 0, 1]
    assert nice_ticks(2, 2) == [1, 1.5, 2, 2.5, 3]
    assert "<circle" in line_chart("one", [1], [Series("a", [0.5], "a")])
    broken = line_chart("broken", [1, 2, 3, 4, 5], [Series("a", [1, 2, float("nan"), 4, 5], "a")])
    assert broken.count("<polyline") == 2 and "nan" not in broken
    assert "<line" in line_chart("none", [1], [Series("a", [float("inf")], "a")])
    assert "&lt;b&gt;" in line_chart("<b>", [1], [Series("a", [1.0], "a")])


def test_charts_of_changes_share_a_scale_on_which_losses_are_left_of_0():
    axis, (loss, gain) = change_charts([Change(-5.0, -10.0, 0.0, -2.0), Change(4.0, 3.0, 5.0, -5.0)])
    assert [label for label in ("\u221210", "\u22125", "0", "+5") if f">{label}</text>" in axis] and "+10" not in axis
    assert 'cx="33.33%"' in loss and 'x1="0.00%" x2="66.67%"' in loss and '<rect class="beyond" width="53.33%"' in loss
    assert 'cx="93.33%"' in gain and '<rect class="beyond" width="33.33%"' in gain
    assert '<line class="axis" x1="66.67%"' in loss and '<line class="axis" x1="66.67%"' in gain
