"""Ends a driver in order on Ctrl-C, on `ray job stop` or a scheduler's signal, and when its terminal closes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOGETHER_S = 2.0
"""Signals within these seconds are one: `timeout` and terminals signal a process and its group."""


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Turn the first of SIGNALS into a KeyboardInterrupt, on which runs are recorded as stopped.

    The command then exits with 128 + the signal's number. Another signal after `TOGETHER_S` ends the process at once.
    Signals that are ignored, as SIGHUP is under nohup, stay so.
    """
    received: list[int] = []
    first = 0.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
            raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")
        if time.monotonic() - first > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("vce-ray: interrupted; the same command resumes from here", err=True)
        raise typer.Exit(128 + (received or [signal.SIGINT])[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
