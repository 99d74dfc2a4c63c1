"""Which run a worker group trains next, and the CPUs of its workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from vce_ray.training.objectives.vsafe_dpo import VSafeDPOConfig
from vce_ray.training.queue import Event, TrainingQueue
from vce_ray.training.train import on_cpus


def test_a_group_resumes_what_it_lost_and_gives_up_what_is_lost_too_often() -> None:
    async def scenario() -> None:
        queue, fault = TrainingQueue(1), ValueError("unusable data")
        assert await queue.add("a", {"run": "a"}) == 0 and await queue.add("b", {"run": "b"}) is None
        assert await queue.take(0) == {"run": "a"} == await queue.take(0), "its workers were lost"
        assert await queue.fail(0) is None and await queue.has_work(0), "lost no more than twice"
        assert await queue.take(0) == {"run": "a"} == await queue.take(0)
        assert await queue.fail(0) == "a"
        assert await queue.take(0) == {"run": "b"}
        await queue.finish(0, fault)
        assert await queue.take(0) is None
        assert await queue.add("c", {"run": "c"}) is None and await queue.has_work(0), (
            "it was added while the group closed"
        )
        assert await queue.fail(0) == "c", "no worker started it: it fails with what kept them from starting"
        assert await queue.fail(0) is None and not await queue.has_work(0)
        assert await queue.add("d", {"run": "d"}) == 0
        await queue.close()
        events = [event async for event in all_events(queue)]
        assert [(event.name, event.kind, event.error) for event in events] == [
            ("a", "started", None),
            ("b", "started", None),
            ("b", "ended", fault),
        ]

    asyncio.run(scenario())


async def all_events(queue: TrainingQueue) -> AsyncIterator[Event]:
    while (event := await queue.next_event()) is not None:
        yield event


def test_a_worker_asks_for_no_more_cpus_than_a_node_has() -> None:
    one, three = VSafeDPOConfig(num_workers=1), VSafeDPOConfig(num_workers=3, batch_size=3, keep_batch_size=3)
    assert on_cpus([one], [2], 1) == (1, 2) and on_cpus([three], [8], 1) == (3, 2) and on_cpus([one], [2], 3) == (1, 1)
    assert on_cpus([one], [1, 1, 1], 1) == (1, 1) and on_cpus([one], [0, 4, 6], 1) == (1, 6)
    assert on_cpus([three], [0, 4, 6], 1) == (3, 3) and on_cpus([one], [], 1) == (1, 1)


def test_by_default_cpus_of_a_node_share_a_training() -> None:
    assert on_cpus([VSafeDPOConfig()], [2], 1) == (2, 1) and on_cpus([VSafeDPOConfig()], [2], 2) == (1, 1)
    assert on_cpus([VSafeDPOConfig()], [1, 1, 1], 1) == (1, 1) and on_cpus([VSafeDPOConfig()], [16], 1) == (4, 4)
    assert on_cpus([VSafeDPOConfig(), VSafeDPOConfig(batch_size=6)], [16], 1) == (2, 8) and on_cpus(
        [VSafeDPOConfig()], [], 1
    ) == (1, 1)
