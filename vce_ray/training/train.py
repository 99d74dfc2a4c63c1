"""VSafe-DPO on Ray Train, as its driver sees it: how many workers of what size train the runs that are ready."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vce_ray.config import TrainConfig
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.training.queue import MAX_FAULTS, TrainingQueue

THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep: spinning, they take the cores of whatever else runs, drawing or another
training, and a step takes several times as long."""
NOTES = "ray_train"
"""Where Ray Train keeps what it notes of a lane: in the store of the run that the lane was opened for."""


class Trainings:
    """Trains runs as their pair sets come, so many at once.

    Workers that are done with one take up the next that waits, with the base they have loaded, and go when none does:
    GPUs that are not needed are free for what else is to be made.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        at_once: int,
        began: Callable[[str], None],
        ended: Callable[[str], None],
    ):
        """
        Args:
            configs: of all runs that may come; they agree in `num_workers`.
            at_once: how many are trained at a time. Where the cluster has no GPUs, they share its CPUs.
            began: called with the name of a run that is taken up, in a thread of its own.
            ended: called with the name of a run whose adapter and figures are in its store.
        """
        self.at_once = at_once
        self._configs, self._began, self._ended = configs, began, ended
        # on this node: it is lost with the driver, and not with any other
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue: Any = ray.remote(TrainingQueue)
        self._queue = queue.options(num_cpus=0, scheduling_strategy=here).remote(at_once)
        self._futures: dict[str, Future[None]] = {}
        self._threads = ThreadPoolExecutor(at_once + 1)
        self._threads.submit(self._listen)

    def submit(self, name: str, run: RunConfig, store: Store, facts: dict[str, Any]) -> Future[None]:
        """Puts a run in line that has its pairs published.

        Args:
            facts: what its adapter's card says beside its base.

        Returns:
            what is done when the run is trained, or has failed with what ended it.
        """
        future = self._futures[name] = Future()
        settings = {"run": run.model_dump(mode="json"), "store": store.uri, "facts": facts}
        lane: Any = ray.get(self._queue.add.remote(name, settings))
        if lane is not None:
            self._threads.submit(self._keep_open, lane, store)
        return future

    def close(self) -> None:
        """Waits for lanes that have nothing left to train; what still trains ends with Ray's session."""
        self._queue.close.remote()
        self._threads.shutdown(wait=all(future.done() for future in self._futures.values()), cancel_futures=True)

    def _listen(self) -> None:
        try:
            while (event := ray.get(self._queue.next_event.remote())) is not None:
                future = self._futures[event.name]
                if future.done():  # it has failed already
                    continue
                try:
                    if event.fault is not None:
                        raise event.fault
                    if event.kind == "begun":
                        self._began(event.name)
                    else:
                        self._ended(event.name)
                        future.set_result(None)
                except Exception as error:
                    self._fail(event.name, error)
        except Exception as error:  # the queue is gone, and nothing more will be heard
            for name in list(self._futures):
                self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # it has come to an end before
            self._futures[name].set_exception(error)

    def _keep_open(self, lane: int, store: Store) -> None:
        while ray.get(self._queue.goes_on.remote(lane)):
            try:
                self._fit(lane, store)
            except Exception as error:
                name: Any = ray.get(self._queue.lose.remote(lane))
                if name is not None:
                    self._fail(name, error)
        store.delete_prefix(NOTES)

    def _fit(self, lane: int, store: Store) -> None:
        import ray.train.torch  # seconds long, in a thread that nothing waits for

        gpus = ray.cluster_resources().get("GPU", 0) > 0  # the driver may run on a head node without any
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if gpus:
            workers, resources, threads = self._configs[0].num_workers or 1, None, THREADS
        else:
            workers, cpus = on_cpus(self._configs, nodes, self.at_once)
            resources, threads = {"CPU": cpus}, THREADS | {"OMP_NUM_THREADS": str(cpus)}
        trainer = ray.train.torch.TorchTrainer(
            _loop,
            train_loop_config={"queue": self._queue, "lane": lane},
            scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=resources),
            run_config=ray.train.RunConfig(
                name=NOTES,
                storage_path=store.root,
                storage_filesystem=store.patient_filesystem(),
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAULTS),
                worker_runtime_env={"env_vars": threads},
            ),
        )
        trainer.fit()


def on_cpus(configs: Sequence[TrainConfig], nodes: list[int], at_once: int) -> tuple[int, int]:
    """The workers of a training on CPUs, and the most CPUs that each can have on nodes with so many.

    Two workers of one thread are faster than two threads, which wait for each other at each small operation. Only the
    CPUs of one node are taken by default, and of them four: each worker loads the base.
    """
    if configs[0].num_workers is None:
        share = max(nodes, default=1) // at_once
        batches = math.gcd(*(size for config in configs for size in (config.batch_size, config.keep_batch_size)))
        workers = max(n for n in (1, 2, 4) if batches % n == 0 and n <= max(1, share))
    else:
        workers = configs[0].num_workers
    sizes = range(max(nodes, default=0), 1, -1)
    return workers, next((size for size in sizes if sum(cpus // size for cpus in nodes) >= workers * at_once), 1)


def _loop(settings: dict[str, Any]) -> None:
    from vce_ray.training.loop import train_lane  # peft and transformers, which the driver has no use for

    train_lane(settings["queue"], settings["lane"])


os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # the default of 60 s is too short on CPU
