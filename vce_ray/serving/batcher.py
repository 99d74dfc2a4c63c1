"""Draws what waits in batches, in a thread of its own.

Not `@serve.batch`: in Ray 2.60 that closes a batch after its wait time even while another one runs (its semaphore is
taken only afterwards), so requests which arrive during a decode of seconds would be drawn one by one. Here everything
that waits when the decoder gets free goes into the next batch, image by image, in the order of arrival.
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
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 120


@dataclass(frozen=True)
class Busy:
    """Why nothing was drawn: so many items wait already."""

    waiting: int
    limit: int
    retry_after_s: int


class Batcher(Generic[T, R]):
    """A bounded queue before one worker thread.

    Args:
        work: called in the thread with up to `max_batch` items and a function that says whether all their callers have
            gone; gives one result for each item, and may give up, with fewer, once they have.
        max_batch: items of one call.
        max_waiting: items that may wait besides those being worked on.
        linger_s: how long an idle worker waits for company to the first item.
    """

    def __init__(
        self,
        work: Callable[[list[T], Callable[[], bool]], Sequence[R]],
        max_batch: int,
        max_waiting: int,
        linger_s: float,
    ):
        self._work = work
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._linger_s = linger_s
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._task: asyncio.Task[None] | None = None
        self._seconds_per_batch = 1.0

    async def submit(self, items: Sequence[T]) -> list[R] | Busy:
        """Results of all items, or Busy where they do not fit into the queue. Raises what `work` raised.

        If the caller is cancelled, those of its items that still wait are dropped, and a batch that nobody waits for
        any more is told to stop.
        """
        waiting = sum(not future.done() for _, future in self._queue)
        if waiting + len(items) > self._max_waiting:
            batches = math.ceil((waiting + 1) / self._max_batch)
            seconds = min(math.ceil(batches * self._seconds_per_batch), MAX_RETRY_AFTER_S)
            return Busy(waiting, self._max_waiting, seconds)
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
            if not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
                await asyncio.sleep(self._linger_s)
            batch = self._take()
            if not batch:
                continue
            started = time.monotonic()
            try:
                items = [item for item, _ in batch]
                results = await loop.run_in_executor(self._thread, self._work, items, partial(_abandoned, batch))
                if _abandoned(batch):
                    continue
                assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                _settle(batch, lambda future, _, error=error: future.set_exception(error))
            else:
                _settle(batch, lambda future, i, results=results: future.set_result(results[i]))
            self._seconds_per_batch += 0.3 * (time.monotonic() - started - self._seconds_per_batch)

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The next items, without those whose caller has gone."""
        batch = []
        while self._queue and len(batch) < self._max_batch:
            entry = self._queue.popleft()
            if not entry[1].done():
                batch.append(entry)
        return batch


def _abandoned(batch: list) -> bool:
    """Whether every caller of a batch has gone."""
    return all(future.done() for _, future in batch)


def _settle(batch: list, how: Callable[[asyncio.Future, int], None]) -> None:
    """Settles each future of a batch that nobody has cancelled meanwhile."""
    for i, (_, future) in enumerate(batch):
        if not future.done():
            how(future, i)
