"""The scripts that train the embedded model: each resumes from its checkpoint, and the results can be exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.emoji_world import train_janus
from tools.emoji_world.progress import load_checkpoint

SCRIPTS = [  # in the order in which they are run: each needs the output of the earlier ones
    ("train_vq", "vq.pt", ["--batch", "2", "--codebook-at", "0"]),
    ("train_janus", "janus.pt", ["--batch", "2", "--captions", "1", "--pictures", "8"]),
    ("refine_decoder", "decoder.pt", ["--batch", "2"]),
    ("train_judge", "judge.pt", ["--batch", "4"]),
]


def run(script: str, out: Path, steps: int, options: list[str]) -> str:
    command = [sys.executable, "-m", f"tools.emoji_world.{script}", "--out", str(out), "--steps", str(steps)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_trainings_resume_and_can_be_exported(tmp_path: Path) -> None:
    for script, checkpoint, options in SCRIPTS:
        run(script, tmp_path, 1, options)
        assert "2/2" in run(script, tmp_path, 2, options)
        state = load_checkpoint(tmp_path / checkpoint)
        assert state is not None and state["step"] == 2
    package = tmp_path / "package"
    command = [sys.executable, "-m", "tools.emoji_world.export", "--out", str(tmp_path), "--package", str(package)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (package / "janus/model.safetensors").exists() and (package / "judge/open_clip_config.json").exists()


def test_a_missing_prerequisite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_janus", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"run tools\.emoji_world\.train_vq first"):
        train_janus.main()
