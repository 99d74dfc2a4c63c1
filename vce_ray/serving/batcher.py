"""Draws what waits, in a thread of its own: what comes joins what is underway.

Not `@serve.batch`: in Ray 2.60 that closes a batch after its wait time even while another one runs (its semaphore is
taken only afterwards), so requests which arrive during a decode of seconds would be drawn one by one. Here the thread
works in rounds of a few steps, between which waiting items join as long as there is room, in the order of arrival, and
those whose caller has gone leave.
Knows neither models nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
V = TypeVar("V")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 120


class Work(Protocol[T_contra, R_co]):
    """What is done in the thread; nothing else calls it."""

    def join(self, numbers: Sequence[int], items: Sequence[T_contra]) -> int:
        """Begins items under these numbers; how many, from the first on: as many as there is room for, and one at least
        where nothing is underway."""
        ...

    def advance(self) -> Sequence[tuple[int, R_co]]:
        """Goes on with all that is underway for one round; returns those that have ended."""
        ...

    def drop(self, numbers: Sequence[int]) -> None:
        """Gives items up."""
        ...


@dataclass(frozen=True)
class Busy:
    """Why nothing was drawn: so many items wait already."""

    waiting: int
    limit: int
    retry_after_s: int


@dataclass(frozen=True)
class Entry(Generic[T, R]):
    """An item, and where its caller waits."""

    item: T
    future: asyncio.Future[R]


class Batcher(Generic[T, R]):
    """A bounded queue before one worker thread.

    Args:
        work: what the thread does.
        max_batch: items that may be underway at once.
        max_waiting: items that may wait besides those.
    """

    def __init__(self, work: Work[T, R], max_batch: int, max_waiting: int):
        self._work = work
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._queue: deque[Entry[T, R]] = deque()
        self._underway: dict[int, Entry[T, R]] = {}
        self._begun: dict[int, float] = {}
        self._next = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._task: asyncio.Task[None] | None = None
        self._seconds_underway = 1.0
        """How long an item is underway, of late."""

    async def submit(self, items: Sequence[T]) -> list[R] | Busy:
        """Results of all items, or Busy where they do not fit into the queue. Raises what the work raised.

        If the caller is cancelled, its items are given up, be they waiting or underway.
        """
        waiting = sum(not entry.future.done() for entry in self._queue)
        if waiting + len(items) > self._max_waiting:
            seconds = math.ceil(math.ceil((waiting + 1) / self._max_batch) * self._seconds_underway)
            return Busy(waiting, self._max_waiting, min(seconds, MAX_RETRY_AFTER_S))
        loop = asyncio.get_running_loop()
        entries = [Entry(item, loop.create_future()) for item in items]
        self._queue.extend(entries)
        self._arrived.set()
        if self._task is None:
            self._task = loop.create_task(self._run())
        try:
            return list(await asyncio.gather(*(entry.future for entry in entries)))
        finally:
            for entry in entries:  # where one failed, nobody waits for the others any more
                entry.future.cancel()

    def check(self) -> None:
        """Raises RuntimeError if the loop that feeds the worker has ended."""
        if self._task is not None and self._task.done():
            raise RuntimeError("the batcher's loop has ended: restart this process")

    async def _run(self) -> None:
        """Feeds the worker for as long as the event loop lives."""
        while True:
            if not self._queue and not self._underway:
                self._arrived.clear()
                await self._arrived.wait()
            try:
                await self._drop_abandoned()
                await self._let_join()
                if self._underway:
                    for number, result in await self._in_thread(self._work.advance):
                        self._end(number, result)
            except Exception as error:
                logger.exception("a round of %d failed", len(self._underway))
                await self._fail(error)

    async def _in_thread(self, work: Callable[..., V], *args: Any) -> V:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def _drop_abandoned(self) -> None:
        gone = [number for number, entry in self._underway.items() if entry.future.done()]
        if gone:
            await self._in_thread(self._work.drop, gone)
            for number in gone:
                del self._underway[number], self._begun[number]

    async def _let_join(self) -> None:
        """Begins what waits; what there is no room for goes back to its place in the queue."""
        taken: dict[int, Entry[T, R]] = {}
        while self._queue and len(self._underway) + len(taken) < self._max_batch:
            entry = self._queue.popleft()
            if not entry.future.done():  # its caller has not gone
                taken[self._next] = entry
                self._next += 1
        if not taken:
            return
        self._underway |= taken
        self._begun |= dict.fromkeys(taken, time.monotonic())
        numbers = list(taken)
        joined = await self._in_thread(self._work.join, numbers, [entry.item for entry in taken.values()])
        for number in reversed(numbers[joined:]):
            del self._begun[number]
            self._queue.appendleft(self._underway.pop(number))

    def _end(self, number: int, result: R) -> None:
        self._seconds_underway += 0.3 * (time.monotonic() - self._begun.pop(number) - self._seconds_underway)
        entry = self._underway.pop(number)
        if not entry.future.done():
            entry.future.set_result(result)

    async def _fail(self, error: Exception) -> None:
        """Fails all that is underway. What a traceback refers to, such as half a cache, is let go."""
        numbers, entries = list(self._underway), list(self._underway.values())
        self._underway.clear()
        self._begun.clear()
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(error.with_traceback(None))
        await self._in_thread(self._work.drop, numbers)
