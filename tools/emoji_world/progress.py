"""Shared by the training scripts: a progress line, the learning-rate schedule, checkpoints that survive a kill."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU. Enables TF32 matrix products."""
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Progress:
    """Print a line every `every` seconds: step, averages of the logged values, speed, time left."""

    def __init__(self, name: str, total: int, done: int = 0, every: float = 20.0):
        self.name, self.total, self.every = name, total, every
        self.started, self.first, self.printed = time.monotonic(), done, time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = 0

    def log(self, step: int, **values: float) -> None:
        """Record the values of one step, and print their averages if a line is due."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        now = time.monotonic()
        if now - self.printed < self.every and step + 1 < self.total:
            return
        speed = (step + 1 - self.first) / (now - self.started)
        averages = "  ".join(f"{key} {value / self.count:.4f}" for key, value in self.sums.items())
        left = (self.total - step - 1) / speed / 60
        print(f"{self.name} {step + 1}/{self.total}  {averages}  {speed:.2f} steps/s  {left:.1f} min left", flush=True)
        self.printed, self.count, self.sums = now, 0, {}


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state to a temporary file and rename it, so that a kill leaves either the old or the new checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path) -> dict | None:
    """Return the last saved state, or None if there is none."""
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


class Training:
    """The part of a training loop that all models share: resuming, optimizer steps, checkpoints.

    Args:
        path: the checkpoint. If it exists, model, optimizers and step are restored from it.
        model: the model to save.
        optims: the optimizers to step. Their learning rate warms up linearly to `lr`, stays there, and falls linearly
            to zero over the last share `descent` of all steps.
        every: steps between two checkpoints.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optims: list[torch.optim.Optimizer],
        *,
        steps: int,
        lr: float,
        descent: float = 0.5,
        every: int = 100,
    ):
        self.path, self.model, self.optims = path, model, optims
        self.steps, self.lr, self.descent, self.every = steps, lr, descent, every
        self.state: dict[str, Any] = load_checkpoint(path) or {}
        self.first_step: int = self.state.get("step", 0)
        if self.state:
            model.load_state_dict(self.state["model"])
            for optim, saved in zip(optims, self.state["optims"], strict=True):
                optim.load_state_dict(saved)
        self.progress = Progress(path.stem, steps, self.first_step)

    def learning_rate(self, step: int, warmup: int = 100) -> float:
        """Return the learning rate of a step."""
        return self.lr * min(1.0, (step + 1) / warmup, max(0.0, (self.steps - step) / (self.descent * self.steps)))

    def finish_step(self, step: int, values: dict[str, float], **extra: Any) -> None:
        """Step the optimizers, log the values, and save a checkpoint if one is due.

        `extra` is saved with the model and optimizers, and restored into `state` when the training resumes.
        """
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.learning_rate(step)
            optim.step()
        self.model.zero_grad(set_to_none=True)
        self.progress.log(step, **values)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            saved = {"model": self.model.state_dict(), "optims": [optim.state_dict() for optim in self.optims]}
            save_checkpoint(self.path, saved | {"step": step + 1} | extra)
