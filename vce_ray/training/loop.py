"""VSafe-DPO as each Ray Train worker runs it: one to n workers give the same training.

What a step trains on is a function of (seed, step), the batch is split evenly over the workers, and gradients are
averaged, so the number of workers changes the speed only.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import ray.train
import ray.train.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from vce_ray.config import RunConfig
from vce_ray.models.adapter import save_adapter
from vce_ray.models.load import base_stamp, check_stamp, load_model
from vce_ray.store import Store
from vce_ray.training.data import TrainingData
from vce_ray.training.fsdp import average_gradients, make_trainable, reference_context, shard
from vce_ray.training.loss import gradient_norm
from vce_ray.training.step import Targets, step_loss

TRAINED = StateDictOptions(ignore_frozen_params=True)
METRICS = "metrics.jsonl"


def train_loop(settings: dict) -> list[dict] | None:
    """Trains on the published pairs of a run. Rank 0 returns the figures of all steps."""
    run = RunConfig.model_validate(settings["run"])
    config, store = run.train, Store(settings["store"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = load_model(run.base, str(device))
    manifest = store.stage("reference").manifest()
    assert manifest is not None, "training comes after its reference"
    check_stamp(manifest["facts"], base_stamp(run.base))
    data = TrainingData.from_tables(
        store.stage("pairs").read(),
        store.stage("reference").read(),
        store.stage("keep").read(columns=["sample_id", "prompt", "tokens"]),
        config,
    )
    torch.manual_seed(run.seed)
    make_trainable(model.net, config)
    sharded = workers > 1 and (device.type != "cpu" if config.shard is None else config.shard)
    if sharded:
        shard(model.net, workers, device.type)
    held = config.preserves or config.anchors
    reference = model if config.weights == "lora" or not held else load_model(run.base, str(device))
    targets = Targets(reference, reference_context(model, reference), sharded=sharded and reference is model)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    history = _resume(model.net, optimizer)
    for step in range(len(history), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        share = step, rank, workers, config, run.seed
        pairs = _to(data.pair_batch(*share), device)
        keep = _to(data.keep_batch(*share), device) if config.preserves else None
        safe = _to(data.anchor_batch(*share), device) if config.anchors else None
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
            print(f"train {step + 1}/{config.steps}  {shown}", flush=True)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            _report(model.net, optimizer, history, rank)
    state = get_model_state_dict(
        model.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
    if rank == 0:
        _upload(store, state, model.revision, run, settings["facts"])
    return history if rank == 0 else None


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


def _report(net: torch.nn.Module, optimizer: torch.optim.Optimizer, history: list[dict], rank: int) -> None:
    """Saves what a killed training goes on from. Every worker reports its own shard."""
    weights, moments = get_state_dict(net, optimizer, options=TRAINED)
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"weights": weights, "moments": moments}, checkpoint_id=folder)
        if rank == 0:
            Path(folder, METRICS).write_text("".join(json.dumps(row) + "\n" for row in history))
        ray.train.report(
            {"step": history[-1]["step"], "loss": history[-1]["loss"]},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )


def _resume(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Loads the last checkpoint where there is one; returns the figures of the steps it has behind it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
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
        return [json.loads(line) for line in Path(folder, METRICS).read_text().splitlines()]


def _upload(store: Store, state: dict, revision: str, run: RunConfig, facts: dict) -> None:
    """Writes the adapter folder and puts it into the run's store."""
    config = run.train
    lora = {"rank": config.lora_rank, "alpha": config.lora_alpha} if config.weights == "lora" else None
    if lora:
        state = {name.replace(".default.", "."): tensor for name, tensor in state.items() if "lora_" in name}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), state, revision, lora, facts)
        store.upload(folder, "adapter")
