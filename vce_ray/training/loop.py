"""The training loop that each Ray Train worker runs, for every objective.

A step's batch is a function of (seed, step), it is split evenly over the workers, and gradients are averaged, so the
number of workers changes the speed and not the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vce_ray.errors import UserError
from vce_ray.models.adapter import remove_lora, save_adapter
from vce_ray.models.base import ImageModel
from vce_ray.models.folder import base_stamp, check_stamp
from vce_ray.models.load import load_model
from vce_ray.run_config import RunConfig
from vce_ray.storage.local_folder import temporary_folder
from vce_ray.storage.store import Store
from vce_ray.training import HISTORY_FILE, checkpoints
from vce_ray.training.data import Share, TrainingData
from vce_ray.training.fsdp import average_gradients, clip_gradients, gradient_norm, shard
from vce_ray.training.objectives import objective_for
from vce_ray.training.terms.divergence import Targets
from vce_ray.training.trainable import in_own_dtype, make_trainable, recompute_layers, reference_context
from vce_ray.worker_warnings import mark_warnings


def train_group(queue: Any, group: int) -> None:
    """Train the runs that a worker group takes from the queue (queue.py), one after the other, until it is empty.

    The base stays loaded between runs unless it was trained itself or sharded. A run with unusable data fails alone;
    any other exception ends these workers, and their successors resume the run.
    """
    mark_warnings()
    rank, model = ray.train.get_context().get_world_rank(), None
    while (settings := _next(queue, group)) is not None:
        error = None
        try:
            run, store = RunConfig.model_validate(settings["run"]), Store(settings["store"])
            data = read_data(run, store)
        except UserError as unusable:
            error = unusable
        else:
            model = train_run(model, run, store, data, settings["facts"], lambda row: queue.report.remote(group, row))
        if rank == 0:
            ray.get(queue.finish.remote(group, error))


def _next(queue: Any, group: int) -> dict[str, Any] | None:
    """Return the next training. Only rank 0 asks the queue; the others hear it by broadcast, so all agree."""
    context = ray.train.get_context()
    heard: list[Any] = [ray.get(queue.take.remote(group)) if context.get_world_rank() == 0 else None]
    if context.get_world_size() > 1:
        device = ray.train.torch.get_device()
        torch.distributed.broadcast_object_list(heard, device=device)
    return heard[0]


def read_data(run: RunConfig, store: Store) -> TrainingData:
    """Read the published pairs of a run.

    Raises:
        UserError: they cannot be trained on.
        StoreError: this machine cannot read them.
    """
    reference = store.stage("reference").read()
    manifest = store.stage("reference").manifest()
    assert manifest is not None, "it has just been read"
    check_stamp(manifest["facts"], base_stamp(run.base))
    return TrainingData.from_tables(
        store.stage("pairs").read(),
        reference,
        store.stage("keep").read(columns=["sample_id", "prompt", "tokens"]),
        run.train.prompt_modes,
    )


def _load(base: str, device: torch.device) -> ImageModel:
    model = load_model(base, str(device))
    if device.type == "cuda":
        recompute_layers(model.net)
    return model


def train_run(
    model: ImageModel | None,
    run: RunConfig,
    store: Store,
    data: TrainingData,
    facts: dict[str, Any],
    on_step: Callable[[dict[str, Any]], None],
) -> ImageModel | None:
    """Train one run and write its adapter and the metrics of all steps to its store.

    Args:
        model: the base, if it is still loaded.
        facts: what the adapter's card says besides its base.
        on_step: called by rank 0 with each step's row of the history, those before a checkpoint included.

    Returns:
        The unchanged base for the next run, or None if it has to be loaded again.
    """
    config, context = run.train, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    objective, share = objective_for(config), Share(rank, workers, run.seed)
    model = model or _load(run.base, device)
    torch.manual_seed(run.seed)
    make_trainable(model.net, config)
    sharded = workers > 1 and (device.type != "cpu" if config.shard is None else config.shard)
    if sharded:
        shard(model.net, workers, device.type)
    lora = config.weights == "lora"
    # a LoRA can be switched off to get the base back; fully trained weights need a second copy of the base
    reference = model if lora or not objective.needs_base else load_model(run.base, str(device))
    targets = Targets(reference, reference_context(model, reference), sharded=sharded and reference is model)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    history = checkpoints.load(store, model.net, optimizer)
    if rank == 0:
        for row in history:  # the driver that heard of them may be gone
            on_step(row)
    for step in range(len(history), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        batch = objective.batch(data, step, share).to(device)
        with in_own_dtype(model.net):
            loss, metrics = objective.loss(model, targets, batch, step)
            loss.backward()
        if workers > 1 and not sharded:
            average_gradients(trained, workers)
        norm = gradient_norm(trained)
        clip_gradients(trained, norm, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = _mean_over_workers(metrics, workers, device)
        history.append({"step": step + 1} | metrics | {"gradient_norm": norm.item()})
        if rank == 0:
            on_step(history[-1])
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            checkpoints.save(store, model.net, optimizer, history, rank, workers)
    # every worker takes part in gathering a sharded model, though only the first one writes it
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model.net, options=whole)
    if rank == 0:
        _upload(store, state, model, run, facts)
        store.write_json(HISTORY_FILE, history)
        store.delete_prefix(checkpoints.FOLDER)
    if sharded or not lora:
        return None
    remove_lora(model.net)
    return model


def _schedule(step: int, steps: int) -> float:
    """Learning rate factor: warm-up over the first tenth, then linear decay to a tenth."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, 1.0 - 0.9 * step / steps)


def _mean_over_workers(metrics: dict[str, float], workers: int, device: torch.device) -> dict[str, float]:
    if workers == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), device=device)
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / workers).tolist(), strict=True))


def _upload(store: Store, state: dict, model: ImageModel, run: RunConfig, facts: dict) -> None:
    """Write the adapter folder to the run's store."""
    config = run.train
    lora = {"rank": config.lora_rank, "alpha": config.lora_alpha} if config.weights == "lora" else None
    if lora:
        state = {name.replace(".default.", "."): tensor for name, tensor in state.items() if "lora_" in name}
    with temporary_folder() as folder:
        save_adapter(folder, state, model, lora, facts)
        store.upload(folder, "adapter")
