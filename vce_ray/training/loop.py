"""VSafe-DPO as each Ray Train worker runs it: one to n workers give the same training.

What a step trains on is a function of (seed, step), the batch is split evenly over the workers, and gradients are
averaged, so the number of workers changes the speed only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vce_ray.errors import UserError
from vce_ray.models.adapter import remove_lora, save_adapter
from vce_ray.models.base import ImageModel
from vce_ray.models.load import base_stamp, check_stamp, load_model
from vce_ray.pipeline.run import TRAINING
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.training import checkpoints
from vce_ray.training.data import TrainingData
from vce_ray.training.fsdp import (
    average_gradients,
    in_own_dtype,
    make_trainable,
    recompute_layers,
    reference_context,
    shard,
)
from vce_ray.training.loss import gradient_norm
from vce_ray.training.step import Targets, step_loss


def train_lane(queue: Any, lane: int) -> None:
    """Trains the runs that a lane takes from the queue (queue.py), one after the other, until none waits.

    The base stays loaded from one to the next, unless it was trained itself or is sharded. A run whose data is not to
    be trained on fails alone; any other fault ends these workers, and the next ones go on with the run.
    """
    rank, model = ray.train.get_context().get_world_rank(), None
    while (settings := _next(queue, lane)) is not None:
        fault = None
        try:
            run, store = RunConfig.model_validate(settings["run"]), Store(settings["store"])
            data = read_data(run, store)
        except UserError as error:
            fault = error
        else:
            model = train_run(model, run, store, data, settings["facts"])
        if rank == 0:
            ray.get(queue.end.remote(lane, fault))


def _next(queue: Any, lane: int) -> dict[str, Any] | None:
    """What all workers of a lane train next, as the first of them hears it."""
    context = ray.train.get_context()
    heard: list[Any] = [ray.get(queue.take.remote(lane)) if context.get_world_rank() == 0 else None]
    if context.get_world_size() > 1:
        device = ray.train.torch.get_device()
        torch.distributed.broadcast_object_list(heard, device=device)
    return heard[0]


def read_data(run: RunConfig, store: Store) -> TrainingData:
    """The published pairs of a run. Raises UserError where they are not to be trained on."""
    manifest = store.stage("reference").manifest()
    assert manifest is not None, "training comes after its reference"
    check_stamp(manifest["facts"], base_stamp(run.base))
    return TrainingData.from_tables(
        store.stage("pairs").read(),
        store.stage("reference").read(),
        store.stage("keep").read(columns=["sample_id", "prompt", "tokens"]),
        run.train,
    )


def _load(base: str, device: torch.device) -> ImageModel:
    model = load_model(base, str(device))
    if device.type == "cuda":
        recompute_layers(model.net)
    return model


def train_run(
    model: ImageModel | None, run: RunConfig, store: Store, data: TrainingData, facts: dict[str, Any]
) -> ImageModel | None:
    """Trains one run, and puts its adapter and the figures of all steps into its store.

    Args:
        model: the base as it was loaded, where it is.
        facts: what the adapter's card says beside its base.

    Returns:
        The base as it was, for the next run; None where it must be loaded again.
    """
    config, context = run.train, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = model or _load(run.base, device)
    torch.manual_seed(run.seed)
    make_trainable(model.net, config)
    sharded = workers > 1 and (device.type != "cpu" if config.shard is None else config.shard)
    if sharded:
        shard(model.net, workers, device.type)
    lora = config.weights == "lora"
    reference = model if lora or not (config.preserves or config.anchors) else load_model(run.base, str(device))
    targets = Targets(reference, reference_context(model, reference), sharded=sharded and reference is model)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    history = checkpoints.load(store, model.net, optimizer)
    for step in range(len(history), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        share = step, rank, workers, config, run.seed
        pairs = _to(data.pair_batch(*share), device)
        keep = _to(data.keep_batch(*share), device) if config.preserves else None
        safe = _to(data.anchor_batch(*share), device) if config.anchors else None
        with in_own_dtype(model.net):
            loss, figures = step_loss(model, targets, pairs, keep, safe, step, config)
            loss.backward()
        if workers > 1 and not sharded:
            average_gradients(trained, workers)
        norm = gradient_norm(trained)
        scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).item()
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures = _mean_over_workers(figures, workers, device)
        history.append({"step": step + 1} | figures | {"gradient_norm": norm.item()})
        if rank == 0 and (step % 10 == 9 or step + 1 == config.steps):
            shown = "  ".join(f"{key} {figures[key]:.3f}" for key in ("loss", "margin", "accuracy"))
            print(f"{run.concept}: train {step + 1}/{config.steps}  {shown}", flush=True)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            checkpoints.save(store, model.net, optimizer, history, rank, workers)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model.net, options=whole)
    if rank == 0:
        _upload(store, state, model.revision, run, facts)
        store.write_json(TRAINING, history)
        store.delete_prefix(checkpoints.FOLDER)
    if sharded or not lora:
        return None
    remove_lora(model.net)
    return model


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: warm-up over the first tenth, then linearly down to a tenth."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, 1.0 - 0.9 * step / steps)


def _to(batch, device: torch.device):
    fields = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    return type(batch)(**fields)


def _mean_over_workers(figures: dict[str, float], workers: int, device: torch.device) -> dict[str, float]:
    if workers == 1:
        return figures
    values = torch.tensor(list(figures.values()), device=device)
    torch.distributed.all_reduce(values)
    return dict(zip(figures, (values / workers).tolist(), strict=True))


def _upload(store: Store, state: dict, revision: str, run: RunConfig, facts: dict) -> None:
    """Writes the adapter folder and puts it into the run's store."""
    config = run.train
    lora = {"rank": config.lora_rank, "alpha": config.lora_alpha} if config.weights == "lora" else None
    if lora:
        state = {name.replace(".default.", "."): tensor for name, tensor in state.items() if "lora_" in name}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), state, revision, lora, facts)
        store.upload(folder, "adapter")
