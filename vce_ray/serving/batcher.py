"""Continuous batching: a bounded queue in front of one worker thread, which new items join while others are in flight.

`@serve.batch` does not do this. In Ray 2.60 it closes a batch when its wait time is over even if the previous batch is
still running (it acquires its semaphore only afterwards), so requests that arrive during a decode of several seconds
would be run one at a time. Here the thread works in rounds of a few steps. Between rounds, waiting items join in order
of arrival as long as there is capacity, and items whose caller has gone leave.

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
    """The work done in the thread. All calls come from that one thread."""

    def join(self, numbers: Sequence[int], items: Sequence[T_contra]) -> int:
        """Start items under these numbers and return how many were started.

        Items are started in order, as many as there is capacity for, and at least one if none is in flight.
        """
        ...

    def advance(self) -> Sequence[tuple[int, R_co]]:
        """Run one round of all items in flight; return the number and result of each one that finished."""
        ...

    def drop(self, numbers: Sequence[int]) -> None:
        """Cancel items. Unknown numbers are ignored."""
        ...


@dataclass(frozen=True)
class Busy:
    """Returned instead of results if too many items are waiting."""

    waiting: int
    limit: int
    retry_after_s: int


@dataclass(frozen=True)
class Entry(Generic[T, R]):
    """An item and the future that its caller awaits."""

    item: T
    future: asyncio.Future[R]


class Batcher(Generic[T, R]):
    """A bounded queue in front of one worker thread.

    Args:
        work: what the thread does.
        max_batch: maximum number of items in flight.
        max_waiting: maximum number of items waiting, in addition to those in flight.
    """

    def __init__(self, work: Work[T, R], max_batch: int, max_waiting: int):
        self._work = work
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._queue: deque[Entry[T, R]] = deque()
        self._in_flight: dict[int, Entry[T, R]] = {}
        self._started: dict[int, float] = {}
        self._next = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._task: asyncio.Task[None] | None = None
        self._item_seconds = 1.0
        """Moving average of the time that an item is in flight."""

    async def submit(self, items: Sequence[T]) -> list[R] | Busy:
        """Return the results of all items, or Busy if they do not fit into the queue. Raises what the work raised.

        If the caller is cancelled, its items are cancelled too, whether waiting or in flight.
        """
        waiting = sum(not entry.future.done() for entry in self._queue)
        if waiting + len(items) > self._max_waiting:
            seconds = math.ceil(math.ceil((waiting + 1) / self._max_batch) * self._item_seconds)
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
            for entry in entries:  # if one item failed, the caller no longer waits for the others
                entry.future.cancel()

    def check(self) -> None:
        """Raise RuntimeError if the loop that feeds the worker has ended."""
        if self._task is not None and self._task.done():
            raise RuntimeError("the batcher's loop has ended: restart this process")

    async def _run(self) -> None:
        """Feed the worker for as long as the event loop runs."""
        while True:
            if not self._queue and not self._in_flight:
                self._arrived.clear()
                await self._arrived.wait()
            try:
                await self._drop_cancelled()
                await self._admit()
                if self._in_flight:
                    for number, result in await self._in_thread(self._work.advance):
                        self._finish(number, result)
            except Exception as error:
                logger.exception("a round of %d items failed", len(self._in_flight))
                await self._fail(error)

    async def _in_thread(self, work: Callable[..., V], *args: Any) -> V:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def _drop_cancelled(self) -> None:
        cancelled = [number for number, entry in self._in_flight.items() if entry.future.done()]
        if cancelled:
            await self._in_thread(self._work.drop, cancelled)
            for number in cancelled:
                del self._in_flight[number], self._started[number]

    async def _admit(self) -> None:
        """Start waiting items. Those that exceed the capacity go back to the front of the queue, in order."""
        taken: dict[int, Entry[T, R]] = {}
        while self._queue and len(self._in_flight) + len(taken) < self._max_batch:
            entry = self._queue.popleft()
            if not entry.future.done():  # skip items cancelled while they waited
                taken[self._next] = entry
                self._next += 1
        if not taken:
            return
        # Registered before the work starts them: if it raises, _fail() must reach these callers too.
        self._in_flight |= taken
        self._started |= dict.fromkeys(taken, time.monotonic())
        numbers = list(taken)
        joined = await self._in_thread(self._work.join, numbers, [entry.item for entry in taken.values()])
        for number in reversed(numbers[joined:]):
            del self._started[number]
            self._queue.appendleft(self._in_flight.pop(number))

    def _finish(self, number: int, result: R) -> None:
        self._item_seconds += 0.3 * (time.monotonic() - self._started.pop(number) - self._item_seconds)
        entry = self._in_flight.pop(number)
        if not entry.future.done():
            entry.future.set_result(result)

    async def _fail(self, error: Exception) -> None:
        """Fail all items in flight."""
        numbers, entries = list(self._in_flight), list(self._in_flight.values())
        self._in_flight.clear()
        self._started.clear()
        for entry in entries:
            if not entry.future.done():
                # Without its traceback, whose frames would keep tensors alive, such as half a KV cache.
                entry.future.set_exception(error.with_traceback(None))
        await self._in_thread(self._work.drop, numbers)
