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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
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
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._underway: dict[int, asyncio.Future[R]] = {}
        self._next = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._task: asyncio.Task[None] | None = None
        self._seconds_per_item, self._since_last_end = 1.0, 0.0

    async def submit(self, items: Sequence[T]) -> list[R] | Busy:
        """Results of all items, or Busy where they do not fit into the queue. Raises what the work raised.

        If the caller is cancelled, its items are given up, be they waiting or underway.
        """
        waiting = sum(not future.done() for _, future in self._queue)
        if waiting + len(items) > self._max_waiting:
            seconds = math.ceil((waiting + 1) * self._seconds_per_item)
            return Busy(waiting, self._max_waiting, max(1, min(seconds, MAX_RETRY_AFTER_S)))
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._queue.extend(zip(items, futures, strict=True))
        self._arrived.set()
        if self._task is None:
            self._task = loop.create_task(self._run())
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:  # where one failed, nobody waits for the others any more
                future.cancel()

    def check(self) -> None:
        """Raises RuntimeError if the loop that feeds the worker has ended."""
        if self._task is not None and self._task.done():
            raise RuntimeError("the batcher's loop has ended: restart this process")

    async def _run(self) -> None:
        """Feeds the worker for as long as the event loop lives."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._queue and not self._underway:
                self._arrived.clear()
                await self._arrived.wait()
            gone = [number for number, future in self._underway.items() if future.done()]
            for number in gone:
                del self._underway[number]
            taken = self._take()
            numbers = range(self._next, self._next + len(taken))
            self._next += len(taken)
            self._underway |= zip(numbers, (future for _, future in taken))
            started = time.monotonic()
            try:
                items = [item for item, _ in taken]
                joined, ended = await loop.run_in_executor(self._thread, self._round, gone, numbers, items)
            except Exception as error:
                logger.exception("a round of %d failed", len(self._underway))
                for future in self._underway.values():
                    if not future.done():
                        future.set_exception(error)
                await loop.run_in_executor(self._thread, self._work.drop, list(self._underway))
                self._underway.clear()
                continue
            for number in numbers[joined:]:
                del self._underway[number]
            self._queue.extendleft(reversed(taken[joined:]))
            for number, result in ended:
                future = self._underway.pop(number)
                if not future.done():
                    future.set_result(result)
            self._since_last_end += time.monotonic() - started
            if ended:
                self._seconds_per_item += 0.3 * (self._since_last_end / len(ended) - self._seconds_per_item)
                self._since_last_end = 0.0

    def _round(
        self, gone: Sequence[int], numbers: Sequence[int], items: Sequence[T]
    ) -> tuple[int, Sequence[tuple[int, R]]]:
        """What the thread does between two looks at the queue: how many items joined, and which have ended."""
        self._work.drop(gone)
        joined = self._work.join(numbers, items) if items else 0
        left = len(self._underway) - len(items) + joined
        return joined, self._work.advance() if left else []

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The next items for which there may be room, without those whose caller has gone."""
        taken = []
        while self._queue and len(self._underway) + len(taken) < self._max_batch:
            entry = self._queue.popleft()
            if not entry[1].done():
                taken.append(entry)
        return taken
