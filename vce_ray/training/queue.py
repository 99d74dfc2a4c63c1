"""Which run a lane trains next. A lane is a group of Ray Train workers that goes on with the base it has loaded, from
run to run, until none waits. Knows no torch: it lives in a small actor beside the driver."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

MAX_FAULTS = 3
"""So many times a training that lost a worker goes on from its last checkpoint."""


@dataclass
class Training:
    """A run that is to be trained.

    Args:
        settings: what its workers need to know, in types of JSON.
    """

    name: str
    settings: dict[str, Any]
    begun: int = 0
    """How many times workers took it up."""


@dataclass(frozen=True)
class Event:
    """A training that was taken up, or one that came to its end; with what ended it where it failed."""

    name: str
    kind: Literal["begun", "ended"]
    fault: BaseException | None = None


class TrainingQueue:
    """Trainings that wait, those in the hands of lanes, and what became of them.

    Args:
        lanes: how many may train at once, numbered from 0.
    """

    def __init__(self, lanes: int):
        self._closed = list(range(lanes))
        self._waiting: deque[Training] = deque()
        self._in_hand: dict[int, Training] = {}
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def add(self, name: str, settings: dict[str, Any]) -> int | None:
        """Puts a training at the end; the lane that is to be opened for it, where there is room for another."""
        self._waiting.append(Training(name, settings))
        return self._closed.pop(0) if self._closed else None

    async def take(self, lane: int) -> dict[str, Any] | None:
        """What a lane trains now: what it had in hand when it lost a worker, else the next; None where none waits."""
        if lane not in self._in_hand:
            if not self._waiting:
                return None
            self._in_hand[lane] = self._waiting.popleft()
            self._events.put_nowait(Event(self._in_hand[lane].name, "begun"))
        self._in_hand[lane].begun += 1
        return self._in_hand[lane].settings

    async def end(self, lane: int, fault: BaseException | None = None) -> None:
        """A lane is done with what it has in hand, or failed at it for good."""
        self._events.put_nowait(Event(self._in_hand.pop(lane).name, "ended", fault))

    async def lose(self, lane: int) -> str | None:
        """A lane's workers failed too often: the name of what is given up for it, that is what they never took up, or
        took up too often; None where the lane is to go on with what it has."""
        if lane not in self._in_hand and self._waiting:
            self._in_hand[lane] = self._waiting.popleft()
        training = self._in_hand.get(lane)
        if training is None or 0 < training.begun <= MAX_FAULTS:
            return None
        return self._in_hand.pop(lane).name

    async def goes_on(self, lane: int) -> bool:
        """Whether there is something to train for a lane that has come to its end; else it is closed."""
        if lane in self._in_hand or self._waiting:
            return True
        self._closed.append(lane)
        return False

    async def next_event(self) -> Event | None:
        """What happened next, as soon as it has; None once this is closed."""
        return await self._events.get()

    async def close(self) -> None:
        """Nothing will happen any more."""
        self._events.put_nowait(None)
