"""What a driver command shows: its own lines and this package's warnings; all else goes to a log file."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from vce_ray.cli import console, display
from vce_ray.cli.display import RunDisplay
from vce_ray.cli.interrupt import exit_on_interrupt
from vce_ray.pipeline.progress import StageProgress
from vce_ray.storage.store import Store
from vce_ray.worker_warnings import find_warning

SCRIPT = """
import logging, subprocess, sys
from pathlib import Path
from vce_ray.cli.console import own_output, redirected

own = own_output()
with redirected(Path(sys.argv[1]), lambda warning: print("warning:", warning, file=own)):
    print("a library")
    print("a library's error", file=sys.stderr)
    subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
    worker = "import logging; from vce_ray.worker_warnings import mark_warnings; mark_warnings()"
    worker += "; logging.getLogger('vce_ray.sampling').warning('no compiler')"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", worker], check=True)
    logging.getLogger("vce_ray.pipeline").warning("the store is slow")
    print("own line", file=own)
print("afterwards")
"""


def test_what_libraries_print_goes_to_the_log_and_our_warnings_are_repeated_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(log)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    lines = ended.stdout.splitlines()
    assert sorted(lines) == ["afterwards", "own line", "warning: no compiler", "warning: the store is slow"]
    assert lines[-1] == "afterwards"
    assert {"a library", "a library's error", "a child"} <= set(log.read_text().splitlines())


@pytest.mark.parametrize(
    "line",
    [
        "vce_ray warning: no compiler",
        "\x1b[36m(MapWorker(MapBatches(Worker)) pid=12)\x1b[0m vce_ray warning: no compiler",
        "(RayTrainWorker pid=4, ip=10.0.0.2) vce_ray warning: no compiler [repeated 2x across cluster]",
        "vce_ray warning: no compiler\x1b[32m [repeated 2x across cluster]\x1b[0m",
    ],
)
def test_a_warning_is_found_in_what_ray_makes_of_it(line: str) -> None:
    assert find_warning(line) == "no compiler"
    assert find_warning("WARNING: no compiler") is None


def test_the_log_is_kept_here_if_the_store_cannot_take_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("what Ray printed")
    (tmp_path / "store").write_text("a file in place of the store")
    said: list[str] = []
    console._upload(tmp_path / "log", Store(tmp_path / "store"), "logs/x.log", said.append)
    kept = re.search(r"kept in (\S+\.log)", said[0])
    assert kept and Path(kept[1]).read_text() == "what Ray printed"
    Path(kept[1]).unlink()


def test_signals_of_a_process_and_its_group_are_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as end, exit_on_interrupt():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # while the record of the run is written
    assert end.value.exit_code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """Watch a run whose stages get further, and return what is shown."""
    monkeypatch.setattr(display, "LOOK_S", 0.02)
    monkeypatch.setattr(display, "LINE_S", 0.1)
    started = time.monotonic()

    def progress() -> dict[str, StageProgress]:
        done = int((time.monotonic() - started) * 100)
        return {"unsafe": StageProgress(done, 512), "captions": StageProgress(done // 4, 192, "1 rejected")}

    run: Any = SimpleNamespace(progress=progress, store=SimpleNamespace(in_bucket=False))
    shown = RunDisplay(stream)
    with shown.watching(run):
        time.sleep(0.5)
        shown.line("[1/9] prompts")
    return stream.getvalue()


def test_a_pipe_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(io.StringIO(), monkeypatch).splitlines()
    assert "[1/9] prompts" in lines and not any("\x1b" in line for line in lines)
    assert any(re.fullmatch(r"\[2/9\] unsafe     \d+ of 512  [\d.]+/s, \d+ s left", line) for line in lines)
    assert any(re.fullmatch(r"\[3/9\] captions   \d+ of 192  [\d.]+/s, \d+ s left  1 rejected", line) for line in lines)


def test_a_terminal_gets_bars_and_no_color_if_it_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colours = re.compile(r"\x1b\[[\d;]*m")
    shown = show(Terminal(), monkeypatch)
    assert "unsafe" in shown and "/512" in shown and "━" in shown and colours.search(shown)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = show(Terminal(), monkeypatch)
    assert "/512" in plain and not re.search(r"\x1b\[[\d;]*3\d", plain)
    assert os.environ["NO_COLOR"]
