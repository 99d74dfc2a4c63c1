"""The GPU script: its parts, that their commands are valid, and how it handles failures and its time budget."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
PARTS = [
    "captured_tests",
    "decode_llamagen_xl",
    "decode_janus_pro_1b",
    "decode_janus_pro_7b",
    "decode_janus_pro_7b_fp8",
    "train_janus_pro_7b",
    "compare_janus_pro_7b",
]
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *find_spec*) echo "$FAKE_MISSING" ;;
    *torch.cuda*) exit "${FAKE_NO_GPU:-0}" ;;
    "-m pytest"*) exit 3 ;;
esac
"""
"""Answers the script's checks for packages and a GPU; its tests fail and its benchmarks pass at once."""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def listed(*arguments: str) -> list[tuple[str, int, int, list[str]]]:
    """Name, expected seconds, limit and command of each part."""
    done = run("--list", *arguments, PYTHON="python")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [(name, int(expected), int(limit), shlex.split(command)) for name, expected, limit, command in rows]


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(FAKE_PYTHON)
    path.chmod(0o755)
    return str(path)


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)
    assert run("--unknown").returncode == 2


def test_parts_are_ordered_by_cost_and_fit_the_default_budget() -> None:
    parts = listed()
    assert [name for name, *_ in parts] == PARTS == [name for name, *_ in listed("--rehearse")]
    expected = [seconds for _, seconds, _, _ in parts]
    assert expected == sorted(expected) and sum(expected) <= 570
    assert all(limit > seconds for _, seconds, limit, _ in parts)


@pytest.mark.parametrize("mode", [[], ["--rehearse"]], ids=["gpu", "rehearsal"])
def test_every_command_is_valid(monkeypatch: pytest.MonkeyPatch, mode: list[str]) -> None:
    class Parsed(Exception):
        pass

    def stop(*_: object) -> None:
        raise Parsed

    for name, _, _, (python, option, module, *arguments) in listed(*mode):
        assert (python, option) == ("python", "-m")
        if module == "pytest":
            assert (ROOT / arguments[-1]).exists()
            continue
        benchmark = importlib.import_module(module)
        monkeypatch.setattr(benchmark, "measure_device", stop)  # the first thing that main() does with its arguments
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            benchmark.main()
        assert Path(arguments[arguments.index("--out") + 1]).name == f"{name}.json"


def test_the_benchmarks_need_neither_ray_nor_an_object_store() -> None:
    code = (
        "import sys, peft, transformers.models.janus.modeling_janus;"
        "sys.modules |= dict.fromkeys(('ray', 'boto3', 'botocore', 'open_clip', 'moto', 'pyarrow'));"
        "import benchmarks.decode, benchmarks.train_step; from vce_ray.models.load import load_model; load_model()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_failing_part_does_not_stop_the_later_ones(tmp_path: Path, fake_python: str) -> None:
    done = run(PYTHON=fake_python, OUT=str(tmp_path / "out"), BUDGET_S="85")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out/summary.json").read_text())
    statuses = {row["part"]: row["status"] for row in rows}
    assert list(statuses) == PARTS
    assert statuses["captured_tests"] == "failed with exit code 3"
    assert statuses["compare_janus_pro_7b"] == "skipped" and "expected to take 90 s" in done.stdout
    assert {statuses[name] for name in PARTS[1:-1]} == {"passed"}
    assert all("-m" in row["command"] for row in rows)


def test_missing_packages_and_a_missing_gpu_are_named(tmp_path: Path, fake_python: str) -> None:
    out = str(tmp_path / "out")
    done = run(PYTHON=fake_python, OUT=out, FAKE_MISSING="peft pydantic")
    assert done.returncode == 2 and f"has no peft, pydantic: install with '{fake_python} -m pip" in done.stderr
    done = run(PYTHON=fake_python, OUT=out, FAKE_NO_GPU="1")
    assert done.returncode == 2 and "finds no GPU" in done.stderr and "--rehearse" in done.stderr
    assert not Path(out).exists()
