"""Checkpoints of a training: each worker's shard in the run's own store, and one file that names the last step.

They are kept with the run and not where Ray Train would put them, because one group of workers trains several runs.
"""

from __future__ import annotations

import json

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from vce_ray.storage.local_folder import temporary_folder
from vce_ray.storage.store import Store

FOLDER = "checkpoints"
LAST = f"{FOLDER}/last.json"
METRICS_FILE = "metrics.jsonl"
TRAINED = StateDictOptions(ignore_frozen_params=True)


def save(
    store: Store, net: torch.nn.Module, optimizer: torch.optim.Optimizer, history: list[dict], rank: int, workers: int
) -> None:
    """Write weights, optimizer state and the metrics of all steps so far. Every worker calls it for its own shard."""
    step = history[-1]["step"]
    weights, moments = get_state_dict(net, optimizer, options=TRAINED)
    with temporary_folder() as folder:
        dcp.save({"weights": weights, "moments": moments}, checkpoint_id=folder)
        if rank == 0:
            (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in history))
        if any(folder.iterdir()):  # unsharded weights are written by the first worker only
            store.upload(folder, f"{FOLDER}/{step}/{rank}")
    if workers > 1:
        torch.distributed.barrier()  # `last.json` must not name a step before all shards of it are there
    if rank == 0:
        previous = store.read_json(LAST)["step"] if store.exists(LAST) else step
        store.write_json(LAST, {"step": step})
        if previous != step:
            store.delete_prefix(f"{FOLDER}/{previous}")


def load(store: Store, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Load the last checkpoint if there is one, and return the metrics of the steps it covers.

    The number of workers may differ from when it was saved.
    """
    if not store.exists(LAST):
        return []
    last = f"{FOLDER}/{store.read_json(LAST)['step']}"
    ranks = {file.removeprefix(f"{last}/").split("/")[0] for file in store.list(last)}
    with temporary_folder() as folder:
        for rank in ranks:
            for file in store.fetch(f"{last}/{rank}", folder / rank).iterdir():
                file.rename(folder / file.name)  # dcp expects all shards in one folder
        weights, moments = get_state_dict(net, optimizer, options=TRAINED)
        state = {"weights": weights, "moments": moments}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            net,
            optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["moments"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
