"""Progress of a fleet: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vce_ray.pipeline.stages import NAMES

if TYPE_CHECKING:
    from vce_ray.pipeline.fleet import Member

MARKS = {
    "done": ("done", "green"),
    "running": ("…", "yellow"),
    "failed": ("failed", "red"),
    "stopped": ("stopped", "red"),
}
"""Text and colour of each state of a stage."""


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
def fleet_display() -> Iterator[FleetDisplay]:
    """Open a display on standard output."""
    console = Console()
    display = FleetDisplay(console)
    if not sys.stdout.isatty():
        yield display
        return
    with Live(console=console, get_renderable=display.__rich__, refresh_per_second=2):
        yield display
