"""Checks that all nodes of a cluster see a run's store, before anything is made that only one of them could read.

    check_stores([run.store for run in runs])

A bucket is reachable from everywhere. A folder is the store of a cluster only if every node mounts it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vce_ray.errors import UserError
from vce_ray.storage.store import Store

WAIT_S = 10.0
"""How long a node looks for the files: shared folders may show new ones late."""
JOB_FILES = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the `--working-dir` of a job, on the node that runs its driver."""
log = logging.getLogger(__name__)


def check_stores(stores: Sequence[Store]) -> None:
    """Check that all nodes that can run actors see the stores that are folders, by a file that this process writes.

    Logs a warning about a store in a job's copy of its working directory, which Ray deletes sooner or later.

    Raises:
        UserError: a node does not see a store. The message names both and the fix.
        StoreError: a store cannot be written to.
    """
    folders = [store for store in stores if not store.in_bucket]
    for store in folders:
        if JOB_FILES in store.root:
            log.warning(
                "%s is in this job's copy of its working directory, which Ray deletes: give --store s3://..., "
                "gs://... or the absolute path of a folder to keep the results",
                store.root,
            )
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] != here
    }
    if not folders or not others:
        return
    probe = f"seen-by-all-nodes-{uuid4().hex}"
    try:
        for store in folders:
            store.write_bytes(probe, b"")
        unseen = _unseen([store.full(probe) for store in folders], list(others))
    finally:
        for store in folders:
            store.delete_prefix(probe)
    if unseen:
        node, path = unseen[0]
        raise UserError(
            f"node {others[node]} does not see the store {Path(path).parent}, a folder on "
            f"{ray.util.get_node_ip_address()} ({len(unseen)} of {len(others)} other nodes do not): give --store "
            "s3://bucket/prefix or gs://bucket/prefix, or a folder that every node mounts at the same path"
        )


def _unseen(paths: list[str], nodes: list[str]) -> list[tuple[str, str]]:
    """Return the nodes that do not see all files, each with the first file that it does not see."""
    tasks = {}
    for node in nodes:
        task = _first_missing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        tasks[node] = task.remote(paths)
    found = []
    for node, task in tasks.items():
        try:
            path = ray.get(task)
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError):
            continue  # the node has left the cluster in the meantime
        if path is not None:
            found.append((node, path))
    return found


@ray.remote(num_cpus=0)
def _first_missing(paths: list[str]) -> str | None:
    """Return the first file that this node does not see within WAIT_S, or None if it sees all."""
    deadline = time.monotonic() + WAIT_S
    while missing := [path for path in paths if not os.path.exists(path)]:
        if time.monotonic() > deadline:
            return missing[0]
        time.sleep(0.5)
    return None
