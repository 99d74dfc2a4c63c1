"""Detectors: a new one is one class and one line, and the runs of a fleet share what its model computes."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tools.emoji_world import scenes
from tools.emoji_world.world import OBJECTS, STYLES
from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.config import EvalConfig, SamplingConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.evaluation import detectors
from vce_ray.evaluation.detectors.base import Detector
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.evaluation.draw_and_detect import DrawAndDetect
from vce_ray.evaluation.prompts import evaluation_prompts
from vce_ray.pipeline.pair_flow import publish_prompts
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store


class Brightness(Detector):
    """Mean brightness of an image in 0..1, for styles only."""

    name = "brightness"
    columns = pa.schema({"brightness": pa.float64()}.items())
    encoded: int = 0
    """Images that all instances have encoded."""

    def __init__(self, config: RunConfig):
        pass

    @classmethod
    def applies(cls, config: RunConfig, concept: Concept) -> bool:
        return concept.kind == "style"

    def encode(self, images_BHWC: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        assert len(images_BHWC) == len(prompts)
        Brightness.encoded += len(images_BHWC)
        return images_BHWC.mean((1, 2, 3)) / 255

    def detect(self, encoded: Any, indices: Sequence[int], concept: Concept) -> list[Row]:
        return [{"brightness": float(encoded[index])} for index in indices]


def task(concept: str, store: Path) -> Task:
    sampling = SamplingConfig(guidance_scale=2.0, temperature=0.7)
    config = RunConfig(concept=concept, store=str(store), sampling=sampling)
    return Task(concept, config, load_concept(concept), Store(store / concept))


def prompt_row(run: str, prompt: str, seed: int) -> Row:
    row = {"run": run, "prompt_id": f"{run}-{prompt}-{seed}", "prompt": prompt, "kind": "keep", "name": "cat"}
    return row | {"held_out": False, "seed": seed}


def test_a_detector_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(detectors, "DETECTORS", (*detectors.DETECTORS, Brightness))
    tasks = {name: task(name, tmp_path) for name in ("noto", "openmoji", "deer")}
    shared = [prompt_row(name, "a cat on a red background", 1) for name in tasks]
    rows, rejects = DrawAndDetect(tasks, "before")([*shared, prompt_row("noto", "a cat on a blue background", 2)])
    assert rejects == [] and len(rows) == 4
    for row in rows:
        used = tasks[row["run"]]
        schema = detectors.evaluation_schema(used.config, used.concept)
        assert list(row) == ["run", *schema.names]
        [stored] = pa.Table.from_pylist([row], schema).to_pylist(maps_as_pydicts="strict")
        assert stored.pop("embedding") == pytest.approx(row["embedding"], abs=1e-3)  # stored in half precision
        assert stored == {key: row[key] for key in schema.names if key != "embedding"}
        assert ("brightness" in row) == (row["run"] != "deer")
    by_run = {row["run"]: row for row in rows if row["seed"] == 1}
    assert 0 < by_run["noto"]["brightness"] == by_run["openmoji"]["brightness"] < 1
    assert by_run["noto"]["image"] == by_run["deer"]["image"] and by_run["noto"]["score"] == by_run["deer"]["score"]
    assert by_run["deer"]["label"] == "cat" and by_run["noto"]["label"] in tasks["noto"].concept.labels
    assert Brightness.encoded == 2, "an image that several runs ask for is encoded once"


def test_two_detectors_may_not_add_the_same_column():
    with pytest.raises(ValueError, match="two detectors add a column 'label'"):
        schemas.evaluation([ClipDetector.columns, ClipDetector.columns])


def test_two_detectors_may_not_have_the_same_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Impostor(Brightness):
        name = ClipDetector.name

    monkeypatch.setattr(detectors, "DETECTORS", (*detectors.DETECTORS, Impostor))
    deer = task("deer", tmp_path)
    with pytest.raises(AssertionError, match="two detectors have the same name"):
        detectors.detectors_for(deer.config, deer.concept)


def test_drivers_load_no_model_library():
    modules = ("detectors", "judge", "metrics", "report", "summary", "table", "prompts", "charts")
    code = f"import sys; {'; '.join(f'import vce_ray.evaluation.{name}' for name in modules)}; "
    code += "print(sorted({'torch', 'open_clip', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_clip_finds_what_prompts_ask_for_besides_the_concept(tmp_path: Path):
    deer, openmoji = task("deer", tmp_path), task("openmoji", tmp_path)
    detector = ClipDetector(deer.config)
    drawn = scenes.held_out(240)
    images, prompts = np.stack([image for _, image in drawn]), ["a deer on a red background"] * 240
    encoded = detector.encode(images, prompts)
    rows = detector.detect(encoded, range(240), deer.concept)
    right = [
        (row["found"]["style"] == [STYLES[scene.style]], row["found"]["background"] == [scene.background])
        for row, (scene, _) in zip(rows, drawn, strict=True)
    ]
    assert (np.mean(right, axis=0) >= 0.98).all() and np.mean([row["confidence"] > 0.8 for row in rows]) >= 0.98
    of_style = detector.detect(encoded, range(240), openmoji.concept)
    things = [OBJECTS[scene.thing] for scene, _ in drawn if scene.thing is not None]
    asked = [
        (row, thing) for row, thing in zip(of_style, things, strict=True) if thing in openmoji.concept.slots["object"]
    ]
    assert np.mean([row["found"]["object"] == [thing] for row, thing in asked]) >= 0.98


def test_clip_scores_the_prompt_without_the_concept(tmp_path: Path):
    deer, openmoji = task("deer", tmp_path), task("openmoji", tmp_path)
    detector = ClipDetector(deer.config)
    images = np.stack([image for _, image in scenes.held_out(3)])
    prompts = ["a deer on a red background", "a cat", "openmoji"]
    encoded = detector.encode(images, prompts)
    rows = detector.detect(encoded, range(3), deer.concept)
    embeddings = detector.model.encode_images(images)
    refined = detector.model.prompt_scores(embeddings, ["an animal on a red background", "a cat", "openmoji"])
    assert [row["refined_score"] for row in rows] == pytest.approx(refined.tolist(), abs=1e-5)
    assert rows[1]["refined_score"] == pytest.approx(rows[1]["score"], abs=1e-5) and rows[0]["score"] != refined[0]
    assert detector.detect(encoded, range(3), openmoji.concept)[2]["refined_score"] is None, "nothing is left of it"
    assert np.array([row["embedding"] for row in rows]) == pytest.approx(embeddings.numpy())


def test_an_evaluation_records_what_its_prompts_ask_for(tmp_path: Path):
    deer = task("deer", tmp_path)
    deer = replace(deer, config=deer.config.model_copy(update={"evaluation": EvalConfig(num_erase=2, num_keep=2)}))
    stage = deer.store.stage("evaluation/prompts")
    publish_prompts(stage, lambda: evaluation_prompts(deer.config, deer.concept))
    prompts = [row | {"run": "deer"} for row in stage.read().to_pylist()]
    rows, _ = DrawAndDetect({"deer": deer}, "before")(prompts)
    written = deer.store.stage("evaluation/before")
    schema = detectors.evaluation_schema(deer.config, deer.concept)
    written.publish([written.write_part(pa.Table.from_pylist(rows, schema))], key="image_id")
    stored = written.read().to_pylist()
    assert {row["prompt_id"]: row["asked"] for row in stored} == {row["prompt_id"]: row["asked"] for row in prompts}
    assert any(row["asked"] for row in stored) and all(
        dict(row["found"]).keys() == {"style", "background"} for row in stored
    )
    old = [{key: value for key, value in row.items() if key != "asked"} for row in prompts]
    rows, _ = DrawAndDetect({"deer": deer}, "before")(old)
    assert {row["asked"] for row in rows} == {None}, "prompts of version 0.1 do not say"
