"""The command line as a user meets it: fast help, and messages that say what to fix."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vce_ray
from vce_ray.cli.app import main
from vce_ray.storage.store import Store

STORED_RUN = Path(__file__).parents[1] / "data/run_0_1"


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from vce_ray.cli.app import main; main(['--help']); "
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for command in (
        "demo",
        "erase",
        "fleet",
        "generate",
        "plan",
        "doctor",
        "serve",
        "status",
        "retry-rejects",
        "convert",
    ):
        assert command in done.stdout
    assert "concepts" in done.stdout and "evaluate" in done.stdout


def test_version_and_the_short_help_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["vce-ray", vce_ray.__version__]
    for command in ([], ["erase"], ["generate"]):
        assert main([*command, "-h"]) == 0
        assert "Usage: " in capsys.readouterr().out


def test_concepts_are_listed_and_printed_as_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["concepts"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == vce_ray.catalogue()
    for base in ("emoji-world", "deepseek-community/Janus-Pro-7B"):
        for name in vce_ray.catalogue(base):
            assert main(["concepts", name, "--base", base]) == 0
            file = tmp_path / f"mine-{name}.yaml"
            file.write_text(capsys.readouterr().out)
            assert vce_ray.load_concept(str(file), base) == vce_ray.load_concept(name, base)


def test_evaluate_prints_the_metrics_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(STORED_RUN)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^concept seen +75.0% +100.0%$", printed, re.MULTILINE) and "neighbours recognized" in printed


def test_a_folder_for_images_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for out, message in (
        ("file", f"cannot write {tmp_path}/file (File exists): set --out to a folder that you may write to"),
        ("file/below", f"cannot write {tmp_path}/file/below (Not a directory): set --out to a folder"),
    ):
        assert main(["generate", "a fox", "--out", str(tmp_path / out)]) == 2
        printed = capsys.readouterr().err
        assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["erase", "dear"], "unknown concept 'dear'"),
        (["concepts", "dear"], "Did you mean deer"),
        (["evaluate", "no/such/run"], "no/such/run"),
        (["erase", "dear"], "deer"),
        (["erase", "deer", "--base", "no/such/folder"], "unknown base model 'no/such/folder'"),
        (["erase", "deer", "--store", "s3://"], "not a valid bucket name"),
        (["erase", "deer", "--steps", "0"], "train.steps: input should be greater than or equal to 1, not 0"),
        (["erase", "deer", "--steps", "many"], "--steps"),
        (
            ["erase", "deer", "--method", "dpo", "--keep-weight", "3"],
            "train: unknown setting 'keep_weight': known are method, steps",
        ),
        (["generate", "a deer", "--guidance", "0"], "guidance_scale"),
        (["generate", "a deer", "--seed", str(2**63)], "--seed"),
        (["generate", "a deer", "a fox", "--seed", str(2**63 - 1)], f"give 0 to {2**63 - 2} for 2 images"),
        (["generate", "a deer \udce9"], "half a surrogate pair"),
        (["erase", "deer", "--workers", "3"], "multiple of num_workers 3"),
        (["erase"], "Missing argument"),
        (["nonsense"], "nonsense"),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()  # nothing was started


def test_an_unreadable_store_is_named(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    uri = "s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http"
    assert main(["erase", "deer", "--store", uri]) == 2
    printed = capsys.readouterr().err
    assert "127.0.0.1:9" in printed and "bucket" in printed
    assert "secret-of-the-test" not in printed


def test_an_empty_line_in_a_prompts_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a deer\n\na deer on a red background\n")
    assert main(["erase", "deer", "--prompts", str(prompts), "--store", str(tmp_path / "runs")]) == 2
    assert f"{prompts}, line 2: empty prompt" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_library_error_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only UserError and StoreError are the user's to fix: a ValueError of a library is a fault of the program."""

    def broken(*_: object) -> None:
        raise ValueError("an internal buffer has the wrong size")

    monkeypatch.setattr("vce_ray.storage.store.Store.exists", broken)
    assert main(["status", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "an internal buffer has the wrong size" in printed


def test_status_reads_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"name": "deer-0", "status": "failed", "error": "ValueError: no pairs", "config": {}, "concept": {}}
    record["stages"] = {"prompts": {"state": "done", "started": 1.0, "seconds": 0.5, "rows": 12}}
    Store(tmp_path / "deer-0").write_json("run.json", record)
    assert main(["status", str(tmp_path / "deer-0")]) == 0
    printed = capsys.readouterr().out
    assert "deer-0: failed (ValueError: no pairs)" in printed
    assert "prompts    done" in printed and "12 prompts" in printed
