"""Training as the driver sees it: how many Ray Train workers of what size train the runs that are ready."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from threading import Event, Thread
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vce_ray.config import TrainConfig
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.training.queue import MAX_FAILURES, TrainingQueue

THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Idle OpenMP threads sleep. Spinning, they would take the cores of whatever else runs, drawing or another training,
and a step would take several times as long."""
RAY_TRAIN_FOLDER = "ray_train"
"""Folder for Ray Train's own files, in the store of the run for which a worker group was opened."""


class Trainings:
    """Trains runs as their pair sets become ready, a limited number at once.

    Workers that finish a run take the next one, with the base still loaded, and exit when none waits, so idle GPUs are
    free for other work.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        concurrency: int,
        on_start: Callable[[str], None],
        on_step: Callable[[str, dict[str, Any]], None],
        on_finish: Callable[[str], None],
    ):
        """
        Args:
            configs: settings of all runs that may be submitted; they agree in `num_workers`.
            concurrency: number of runs to train at once. Without GPUs they share the cluster's CPUs.
            on_start: called with a run's name when its training starts, from another thread.
            on_step: called with a run's name and the step's row of its training history, also from another thread.
            on_finish: called with a run's name when its adapter and metrics are in its store.
        """
        self.concurrency = concurrency
        self._configs, self._on_start, self._on_step, self._on_finish = configs, on_start, on_step, on_finish
        # on the driver's node, so that the queue is lost with the driver and with no other node
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue: Any = ray.remote(TrainingQueue)
        self._queue = queue.options(num_cpus=0, scheduling_strategy=here).remote(concurrency)
        self._futures: dict[str, Future[None]] = {}
        self._closed = Event()
        self._threads: list[Thread] = []
        self._start(self._listen)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        # A daemon, unlike the threads of an executor: a driver that is told to end does not wait for a training.
        self._threads.append(Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def submit(self, name: str, run: RunConfig, store: Store, facts: dict[str, Any]) -> Future[None]:
        """Queue a run whose pairs are published.

        Args:
            facts: what its adapter's card says besides its base.

        Returns:
            A future that is done once the run is trained, or holds the exception that ended it.
        """
        future = self._futures[name] = Future()
        settings = {"run": run.model_dump(mode="json"), "store": store.uri, "facts": facts}
        group: Any = ray.get(self._queue.add.remote(name, settings))
        if group is not None:
            self._start(self._keep_open, group, store)
        return future

    def close(self) -> None:
        """Wait for groups that have nothing left to train. Trainings still under way end with Ray's session."""
        self._queue.close.remote()
        if all(future.done() for future in self._futures.values()):
            for thread in self._threads:
                thread.join()
        self._closed.set()

    def _listen(self) -> None:
        try:
            while (event := ray.get(self._queue.next_event.remote())) is not None:
                future = self._futures[event.name]
                if future.done():  # given up before
                    continue
                try:
                    if event.error is not None:
                        raise event.error
                    if event.kind == "started":
                        self._on_start(event.name)
                    elif event.metrics is not None:
                        self._on_step(event.name, event.metrics)
                    else:
                        self._on_finish(event.name)
                        future.set_result(None)
                except Exception as error:
                    self._fail(event.name, error)
        except Exception as error:  # the queue is gone: no further event will come
            for name in list(self._futures):
                self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # already done
            self._futures[name].set_exception(error)

    def _keep_open(self, group: int, store: Store) -> None:
        while ray.get(self._queue.has_work.remote(group)):
            try:
                self._fit(group, store)
            except Exception as error:
                if self._closed.is_set():  # Ray's session has ended, and with it the queue
                    return
                name: Any = ray.get(self._queue.fail.remote(group))
                if name is not None:
                    self._fail(name, error)
        store.delete_prefix(RAY_TRAIN_FOLDER)

    def _fit(self, group: int, store: Store) -> None:
        # Ray Train hands this on to its controller. The default of 60 s is too short for imports on busy CPUs.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
        import ray.train.torch  # takes seconds; in this thread nothing waits for it

        # asked of the cluster and not of this machine: the driver may run on a head node without GPUs
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if gpus:
            workers, resources, threads = self._configs[0].num_workers or 1, None, THREADS
        else:
            workers, cpus = on_cpus(self._configs, nodes, self.concurrency)
            resources, threads = {"CPU": cpus}, THREADS | {"OMP_NUM_THREADS": str(cpus)}
        trainer = ray.train.torch.TorchTrainer(
            _loop,
            train_loop_config={"queue": self._queue, "group": group},
            scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=resources),
            run_config=ray.train.RunConfig(
                name=RAY_TRAIN_FOLDER,
                storage_path=store.root,
                storage_filesystem=store.retrying_filesystem(),
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
                worker_runtime_env={"env_vars": threads},
            ),
        )
        trainer.fit()


def on_cpus(configs: Sequence[TrainConfig], nodes: list[int], concurrency: int) -> tuple[int, int]:
    """Return the number of workers of a training on CPUs, and CPUs per worker.

    Two workers of one thread are faster than two threads, which synchronize at every small operation. By default only
    one node's CPUs are used, and at most four of them, because each worker loads the base.

    Args:
        nodes: CPUs of each node.
        concurrency: trainings that share the cluster.
    """
    if configs[0].num_workers is None:
        share = max(nodes, default=1) // concurrency
        batches = math.gcd(*(getattr(config, field) for config in configs for field in config.batch_fields))
        workers = max(n for n in (1, 2, 4) if batches % n == 0 and n <= max(1, share))
    else:
        workers = configs[0].num_workers
    sizes = range(max(nodes, default=0), 1, -1)
    return workers, next((size for size in sizes if sum(cpus // size for cpus in nodes) >= workers * concurrency), 1)


def _loop(settings: dict[str, Any]) -> None:
    from vce_ray.training.loop import train_group  # peft and transformers, which the driver does not need

    train_group(settings["queue"], settings["group"])
