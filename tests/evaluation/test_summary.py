"""The summary of a fleet: its counts, its next steps, and how long it took."""

from __future__ import annotations

from typing import Any

from test_report import Page
from test_verdict import metrics_of

from vce_ray.evaluation.summary import write_summary

UNSURE, LOSSY = metrics_of(seen=(0.0, 0.0, 0.08)), metrics_of(lost=(0.3, 0.1, 0.5))


def fleet_of(**figures: dict[str, Any] | None) -> dict[str, Any]:
    """The content of fleet.json: the metrics of each concept, None for a run that failed."""
    stages = {"prompts": {"started": 1e9, "seconds": 1.0}, "training": {"started": 1e9 + 40, "seconds": 100.0}}
    stages["report"] = {"started": 1e9 + 165, "seconds": 1.0}
    runs = [
        {"concept": concept, "run": f"{concept}-run", "figures": metrics, "stages": stages if metrics else {}}
        | {"fault": None if metrics else f"{concept} cannot be drawn"}
        for concept, metrics in figures.items()
    ]
    return {"name": "styles", "seconds": 1206.0, "asked": 18_432, "drawn": 4_499, "runs": runs}


def test_counts_runs_by_their_worst_limit() -> None:
    mixed = metrics_of(seen=(0.0, 0.0, 0.08), lost=(0.3, 0.1, 0.5))  # one undecided, three missed
    text = Page(write_summary(fleet_of(a=metrics_of(), b=UNSURE, c=LOSSY, d=mixed, e=None))).text
    assert "4 of 5 runs finished 1 met all limits 1 undecided 2 missed a limit 1 failed" in text
    assert "missed: worst neighbour, all neighbours, image-text score undecided: concept seen" in text


def test_lists_each_next_step_once_with_the_reports_of_its_runs() -> None:
    page = Page(write_summary(fleet_of(deer=UNSURE, noto=UNSURE, orca=LOSSY, dear=None)))
    text = page.text[page.text.index("What to do next") : page.text.index("Results")]
    assert "1 failed without stopping the others" in text
    assert text.count("more images decide what is undecided") == 1 and ": deer , noto ." in text
    assert text.count("too much else was lost") == 1 and ": orca ." in text
    links = [link["href"] for link in page.all("a")]
    assert links.count("../../noto-run/report/index.html") == 2  # in its step and in the table
    assert "dear dear cannot be drawn (run dear-run)" in page.text


def test_says_how_long_the_fleet_and_its_runs_took() -> None:
    text = Page(write_summary(fleet_of(deer=metrics_of()))).text
    assert "The command took 20 min 6 s" in text
    assert "deer 90.0% 1.0% 0.0 points fox 0.0 points 0.0% 0.0 points style met 1 min 40 s 2 min 46 s" in text


def test_a_fleet_of_failures_has_no_table() -> None:
    page = Page(write_summary(fleet_of(dear=None)))
    assert not page.all("table") and "0 of 1 runs finished" in page.text
