"""Progress on the console: live bars or a live table on a terminal, plain lines elsewhere.

Bars are for one run, whose stages flow together; a fleet shows the state of every stage of every run. NO_COLOR is
respected, and nothing but text goes to a pipe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vce_ray.pipeline.stages import NAMES
from vce_ray.storage.errors import StoreError

if TYPE_CHECKING:
    from vce_ray.pipeline.fleet import Member
    from vce_ray.pipeline.run import Run

MARKS = {
    "done": ("done", "green"),
    "running": ("…", "yellow"),
    "failed": ("failed", "red"),
    "stopped": ("stopped", "red"),
}
"""Text and colour of each state of a stage."""
LOOK_S = 1.0
"""Seconds between looks at how far a run in a folder is."""
BUCKET_LOOK_S = 10.0
"""The same for a run in a bucket, where each look is a request that costs money."""
LINE_S = 30.0
"""Seconds after which a pipe gets one line for each stage that has got further."""
SPEED_S = 120.0
"""Seconds over which a rate is the average."""


class Rate(TextColumn):
    """Rows or steps a second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing before it is known."""
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class RunDisplay:
    """Log lines of one run, and the stages that are under way."""

    def __init__(self, stream: TextIO):
        self.console = Console(file=stream, highlight=False)
        columns = (
            TextColumn("[{task.fields[number]}/{task.fields[stages]}] {task.description:<10}", markup=False),
            BarColumn(30),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bars = Progress(
            *columns,
            console=self.console,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self.console.is_terminal,
            speed_estimate_period=SPEED_S,
        )
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.line(f"warning: {text}")

    @contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """Show how far a run is until the block ends."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(run, ended), daemon=True)
        with self._bars:
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
                for task in self._tasks.values():
                    self._bars.remove_task(task)

    def _watch(self, run: Run, ended: threading.Event) -> None:
        printed = time.monotonic()
        while not ended.wait(BUCKET_LOOK_S if run.store.in_bucket else LOOK_S):
            with suppress(StoreError):  # the run itself reports a store that fails
                self._look(run)
            if not self.console.is_terminal and time.monotonic() - printed >= LINE_S:
                printed = time.monotonic()
                self._print_tasks()

    def _look(self, run: Run) -> None:
        progress = run.progress()
        for stage, found in progress.items():
            shown = {"completed": found.done, "total": found.total, "note": found.note}
            if stage in self._tasks:
                self._bars.update(self._tasks[stage], **shown)
            else:
                number = NAMES.index(stage) + 1
                self._tasks[stage] = self._bars.add_task(stage, number=number, stages=len(NAMES), printed=0, **shown)
        for stage in self._tasks.keys() - progress:
            self._bars.remove_task(self._tasks.pop(stage))

    def _print_tasks(self) -> None:
        for task in self._bars.tasks:
            if task.completed > task.fields["printed"]:
                task.fields["printed"] = task.completed
                left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
                rate = f"  {task.speed:.1f}/s{left}" if task.speed else ""
                what = f"{task.description:<10} {task.completed:.0f} of {task.total:.0f}{rate}  {task.fields['note']}"
                self.line(f"[{task.fields['number']}/{len(NAMES)}] {what}".rstrip())


class FleetDisplay:
    """Log lines of runs, and the table of their stages."""

    def __init__(self, console: Console):
        self._console = console
        self._members: Sequence[Member] = ()

    def watch(self, members: Sequence[Member]) -> None:
        """Show these members in the table from now on."""
        self._members = members

    def log(self, name: str, line: str) -> None:
        """Print a line about a run, above the table if there is one."""
        self._console.print(Text(f"{name}: {line}"), soft_wrap=True)

    def __rich__(self) -> Table:
        table = Table("concept", *NAMES, box=None, pad_edge=False, header_style="dim")
        for member in self._members:
            stages = member.run.record["stages"] if member.run else {}
            states = [stages.get(name, {}).get("state") for name in NAMES]
            cells = [Text(*MARKS[state]) if state else Text("") for state in states]
            if member.error and not any(state == "failed" for state in states):
                cells[0] = Text("skipped", "red")
            table.add_row(Text(member.concept), *cells)
        return table


@contextmanager
def fleet_display(stream: TextIO) -> Iterator[FleetDisplay]:
    """Open a display on a stream."""
    console = Console(file=stream, highlight=False)
    display = FleetDisplay(console)
    if not console.is_terminal:
        yield display
        return
    live = Live(
        console=console,
        get_renderable=display.__rich__,
        refresh_per_second=2,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        yield display
