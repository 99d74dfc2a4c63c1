"""VSafe-DPO on Ray Train, as its driver sees it: how many workers of what size run the loop of loop.py."""

from __future__ import annotations

import os

import ray.train
import ray.train.torch

from vce_ray.config import RunConfig, TrainConfig
from vce_ray.store import Store

THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep: spinning, they take the cores of whatever else runs, drawing or another
training, and a step takes several times as long."""
MAX_FAILURES = 3
"""So many times a training that lost a worker goes on from its last checkpoint."""


def train(run: RunConfig, store: Store, facts: dict, at_once: int = 1) -> list[dict]:
    """Trains on the published pairs of a run and uploads the adapter (or full weights) to `adapter/`.

    Args:
        facts: what the adapter's card says beside its base.
        at_once: trainings that share the cluster's CPUs, where it has no GPUs.

    Returns:
        The figures of each step: loss, margin, log-probs of both sides, gradient norm.
    """
    config = run.train
    gpus = ray.cluster_resources().get("GPU", 0) > 0  # the driver may run on a head node without any
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if gpus:
        workers, resources, threads = config.num_workers or 1, None, THREADS
    else:
        workers, cpus = on_cpus(config, nodes, at_once)
        resources, threads = {"CPU": cpus}, THREADS | {"OMP_NUM_THREADS": str(cpus)}
    scaling = ray.train.ScalingConfig(
        num_workers=workers,
        use_gpu=gpus,
        resources_per_worker=resources,
    )
    trainer = ray.train.torch.TorchTrainer(
        _loop,
        train_loop_config={"run": run.model_dump(mode="json"), "store": store.uri, "facts": facts},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=store.root,
            storage_filesystem=store.patient_filesystem(),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            worker_runtime_env={"env_vars": threads},
        ),
    )
    result = trainer.fit()
    assert result.return_value is not None, "rank 0 returns the figures of its steps"
    return result.return_value


def on_cpus(config: TrainConfig, nodes: list[int], at_once: int) -> tuple[int, int]:
    """The workers of a training on CPUs, and the most CPUs that each can have on nodes with so many.

    Two workers of one thread are faster than two threads, which wait for each other at each small operation. Only the
    CPUs of one node are taken by default, and of them four: each worker loads the base.
    """
    if config.num_workers is None:
        share = max(nodes, default=1) // at_once
        even = [n for n in (1, 2, 4) if not (config.batch_size % n or config.keep_batch_size % n)]
        workers = max(n for n in even if n <= max(1, share))
    else:
        workers = config.num_workers
    sizes = range(max(nodes, default=0), 1, -1)
    return workers, next((size for size in sizes if sum(cpus // size for cpus in nodes) >= workers * at_once), 1)


def _loop(settings: dict) -> list[dict] | None:
    from vce_ray.training.loop import train_loop  # peft and transformers, which the driver has no use for

    return train_loop(settings)


os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # the default of 60 s is too short on CPU
