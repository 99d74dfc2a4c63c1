"""Detectors: a new one is one class and one line, and the runs of a fleet share what its model computes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.config import SamplingConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.task import Task
from vce_ray.evaluation import detectors
from vce_ray.evaluation.detectors.base import Detector
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.evaluation.draw_and_detect import DrawAndDetect
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
        assert pa.Table.from_pylist([row], schema).to_pylist() == [{key: row[key] for key in schema.names}]
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
