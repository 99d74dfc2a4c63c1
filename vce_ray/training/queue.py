"""Queue of trainings for worker groups. A group of Ray Train workers keeps the base loaded and trains run after run
until the queue is empty. Torch-free: the queue lives in a small actor beside the driver."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

MAX_FAILURES = 3
"""How often a training that lost a worker resumes from its last checkpoint."""


@dataclass
class Training:
    """A run to train.

    Args:
        settings: what its workers need to know, in JSON types.
    """

    name: str
    settings: dict[str, Any]
    attempts: int = 0
    """How often workers have started it."""


@dataclass(frozen=True)
class Event:
    """A training started, did a step, or ended."""

    name: str
    kind: Literal["started", "step", "ended"]
    error: BaseException | None = None
    """Why it failed, if it did."""
    metrics: dict[str, Any] | None = None
    """Of a step: its row of the training history."""


class TrainingQueue:
    """Trainings that wait, those that groups work on, and what became of them.

    Args:
        groups: number of worker groups that may train at once, numbered from 0.
    """

    def __init__(self, groups: int):
        self._closed = list(range(groups))
        self._waiting: deque[Training] = deque()
        self._active: dict[int, Training] = {}
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def add(self, name: str, settings: dict[str, Any]) -> int | None:
        """Append a training. Returns the number of the group to open for it, or None if all groups are open."""
        self._waiting.append(Training(name, settings))
        return self._closed.pop(0) if self._closed else None

    async def take(self, group: int) -> dict[str, Any] | None:
        """Return what a group trains next: what it was training when it lost a worker, else the next in the queue.

        None if the queue is empty.
        """
        if group not in self._active:
            if not self._waiting:
                return None
            self._active[group] = self._waiting.popleft()
            self._events.put_nowait(Event(self._active[group].name, "started"))
        self._active[group].attempts += 1
        return self._active[group].settings

    async def report(self, group: int, metrics: dict[str, Any]) -> None:
        """Record that a group did a step, with its row of the training history."""
        if group in self._active:  # else a worker that was given up is still alive
            self._events.put_nowait(Event(self._active[group].name, "step", metrics=metrics))

    async def finish(self, group: int, error: BaseException | None = None) -> None:
        """Record that a group has finished its training, or failed at it for good."""
        self._events.put_nowait(Event(self._active.pop(group).name, "ended", error))

    async def fail(self, group: int) -> str | None:
        """Record that a group's workers failed more often than Ray Train retries.

        Returns:
            The name of the training to give up: one that was never started, so its workers cannot start, or one that
            was started too often. None if the group should go on with what it has.
        """
        if group not in self._active and self._waiting:
            self._active[group] = self._waiting.popleft()
        training = self._active.get(group)
        if training is None or 0 < training.attempts <= MAX_FAILURES:
            return None
        return self._active.pop(group).name

    async def has_work(self, group: int) -> bool:
        """Whether there is anything to train for a group whose workers have returned; if not, it is closed."""
        if group in self._active or self._waiting:
            return True
        self._closed.append(group)
        return False

    async def next_event(self) -> Event | None:
        """Wait for the next event. None once the queue is closed."""
        return await self._events.get()

    async def close(self) -> None:
        """End the stream of events."""
        self._events.put_nowait(None)
