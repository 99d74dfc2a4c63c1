"""Continuous batching: the order in which items join, capacity, cancellation, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from vce_ray.serving.batcher import Batcher, Busy


class Tenfold:
    """Work that takes `rounds` rounds for each item and returns ten times the item."""

    def __init__(self, rounds: int = 1, capacity: int = 100):
        self.rounds, self.capacity = rounds, capacity
        self.left: dict[int, int] = {}
        self.items: dict[int, int] = {}
        self.seen: list[list[int]] = []
        """Items in flight in each round."""
        self.go = threading.Event()
        self.go.set()

    def join(self, numbers: Sequence[int], items: Sequence[int]) -> int:
        joined = max(0, self.capacity - len(self.left))
        for number, item in list(zip(numbers, items, strict=True))[:joined]:
            self.left[number], self.items[number] = self.rounds, item
        return min(joined, len(items))

    def advance(self) -> list[tuple[int, int]]:
        self.seen.append([self.items[number] for number in self.left])
        assert self.go.wait(30)
        if 13 in self.seen[-1]:
            raise ArithmeticError("thirteen")
        self.left = {number: left - 1 for number, left in self.left.items()}
        finished = [number for number, left in self.left.items() if left == 0]
        for number in finished:
            del self.left[number]
        return [(number, 10 * self.items[number]) for number in finished]

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.left.pop(number, None)

    async def started(self, rounds: int = 1) -> None:
        while len(self.seen) < rounds:
            await asyncio.sleep(0.01)


def test_waiting_items_join_in_order_as_others_finish():
    work = Tenfold(rounds=2)
    work.go.clear()

    async def run() -> list:
        batcher: Batcher[int, int] = Batcher(work, max_batch=4, max_waiting=7)
        first = asyncio.create_task(batcher.submit([0]))
        await work.started()
        rest = [asyncio.create_task(batcher.submit(items)) for items in ([1, 2], [3, 4, 5], [6], [7, 8])]
        await asyncio.sleep(0.05)
        rest[2].cancel()
        work.go.set()
        return [await first, *await asyncio.gather(*rest, return_exceptions=True)]

    answers = asyncio.run(run())
    assert work.seen == [[0], [0, 1, 2, 3], [1, 2, 3, 4], [4, 5], [5]]
    assert answers[:3] == [[0], [10, 20], [30, 40, 50]]
    assert isinstance(answers[3], asyncio.CancelledError)
    assert answers[4] == Busy(waiting=6, limit=7, retry_after_s=2)


def test_items_beyond_the_capacity_keep_their_place_in_the_queue():
    work = Tenfold(capacity=2)

    async def run() -> list:
        batcher: Batcher[int, int] = Batcher(work, max_batch=4, max_waiting=7)
        return list(await asyncio.gather(batcher.submit([1, 2, 3]), batcher.submit([4])))

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [[10, 20, 30], [40]]
    assert work.seen == [[1, 2], [3, 4]]


def test_items_of_cancelled_callers_are_dropped():
    work = Tenfold(rounds=10**9)

    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_batch=4, max_waiting=7)
        callers = [asyncio.create_task(batcher.submit([item])) for item in (0, 1)]
        await work.started()
        callers[0].cancel()
        while work.seen[-1] != [1]:
            await asyncio.sleep(0.01)
        callers[1].cancel()
        while work.left:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_failing_round_fails_only_its_own_callers():
    work = Tenfold()

    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_batch=2, max_waiting=8)
        answers = await asyncio.gather(batcher.submit([13]), batcher.submit([1, 2, 4]), return_exceptions=True)
        assert isinstance(answers[0], ArithmeticError)
        assert isinstance(answers[1], ArithmeticError), "its first item was in flight in the same round"
        assert await batcher.submit([1, 2, 4]) == [10, 20, 40]
        batcher.check()

    asyncio.run(asyncio.wait_for(run(), 30))
