"""`vce-ray status` over a store that contains more than sound runs."""

from __future__ import annotations

import io
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pytest

from vce_ray.cli.app import main
from vce_ray.dataflow.schemas import REJECTS
from vce_ray.errors import UserError
from vce_ray.pipeline.retry import plan_retry
from vce_ray.pipeline.run import recorded_task
from vce_ray.pipeline.status import status_lines
from vce_ray.storage.errors import StoreError
from vce_ray.storage.store import Store

STORED = Path(__file__).parents[1] / "data/run_0_1"
FOREIGN = ['{"foo": 1}', "[]", '{"name": "x", "status": "done", "config": {}, "concept": {}, "stages": 3}']


@pytest.fixture
def store(tmp_path: Path) -> Store:
    copytree(STORED, tmp_path / "good")
    for number, text in enumerate([*FOREIGN, "{"]):
        (tmp_path / f"bad{number}").mkdir()
        (tmp_path / f"bad{number}/run.json").write_text(text)
    return Store(tmp_path)


def test_unreadable_records_take_one_line_and_hide_no_run(store: Store) -> None:
    lines = list(status_lines(store))
    assert [line.split(":")[0] for line in lines] == ["bad0", "bad1", "bad2", "bad3", "stored"]
    assert all("unreadable" in line and "run.json" in line for line in lines[:4])
    assert "name, status, config, concept, stages" in lines[0] and "which has stages" in lines[2]
    assert "not valid JSON" in lines[3] and lines[4] == "stored: done"


@pytest.mark.parametrize("name", ["bad0", "bad1", "bad2", "bad3"])
def test_every_reader_of_a_record_names_the_file(store: Store, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = store.child(name)
    for read in (lambda: list(status_lines(run)), lambda: plan_retry(run), lambda: recorded_task(run)):
        with pytest.raises((UserError, StoreError), match=rf"{name}/run\.json is"):
            read()
    assert main(["erase", "deer", "--store", store.where(), "--name", name]) == 2
    assert f"{name}/run.json is" in capsys.readouterr().err


def test_a_retry_of_rejects_says_what_it_does_and_asks(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.child("good")
    rejects = run.stage("rejects/safe")
    reject = {"row_id": "r", "stage": "safe", "reason": "fault", "detail": "", "attempt": 1}
    rejects.publish([rejects.write_part(pa.Table.from_pylist([reject], REJECTS))], key="row_id")
    files = run.list()
    redone = "to be made again: safe, pairs, reference, training, evaluation, report"
    command = ["retry-rejects", run.where()]

    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # a pipe is not asked
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "to try again: safe, 1 x fault" in captured.out and redone in captured.out
    assert "nothing was changed: give --yes" in captured.err and run.list() == files

    for answer, deletes in (("n\n", False), ("y\n", True)):
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(command) == 0
        assert ("run the erase command again" in capsys.readouterr().out) == deletes == (run.list() != files)
    assert not run.list("adapter") and not rejects.parts() and not run.stage("safe").published()

    assert main([*command, "--yes"]) == 0
    assert "nothing was rejected" in capsys.readouterr().out
