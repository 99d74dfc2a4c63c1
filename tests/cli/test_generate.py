"""`vce-ray generate` with the embedded model: what it draws, and files that are never replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import vce_ray
from vce_ray.cli.app import main


def test_images_are_numbered_on_and_say_how_they_were_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "some/where"
    command = ["generate", "a fox", "a cat", "--count", "2", "--seed", "7", "--guidance", "3", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{out}/{number:03d}.png  seed {7 + number}  {prompt}"
        for number, prompt in enumerate(["a fox", "a fox", "a cat", "a cat"])
    ]
    assert printed.err == "", "no library says that it loads weights"
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main(["generate", "a fox", "--seed", "8", "--guidance", "3", "--out", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in first} == first, "nothing is replaced"
    again, model = Image.open(out / "004.png"), vce_ray.load_model()
    (drawn,) = vce_ray.draw(model, "a fox", seed=8, guidance_scale=3)
    assert again.tobytes() == drawn.tobytes() == Image.open(out / "001.png").tobytes()
    assert again.info["prompt"] == "a fox" and again.info["seed"] == "8" and again.info["base"] == "emoji-world"
    assert json.loads(again.info["sampling"])["guidance_scale"] == 3


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_made_is_named_before_a_model_loads(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("vce_ray.api.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["generate", "a fox", "--out", str(tmp_path / out)]) == 2
    assert f"cannot write {tmp_path / out}" in capsys.readouterr().err
