"""What the training scripts share: a progress line, optimizer steps on a schedule, checkpoints that survive a kill."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def pick_device() -> torch.device:
    """The GPU where there is one, with products in TF32; else the CPU."""
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Progress:
    """Prints a line every `every` seconds: step, averages of what was logged, speed, time left."""

    def __init__(self, name: str, total: int, done: int = 0, every: float = 20.0):
        self.name, self.total, self.every = name, total, every
        self.started, self.first, self.printed = time.monotonic(), done, time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = 0

    def log(self, step: int, **values: float) -> None:
        """Counts the values of one step, and prints their averages when it is time."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        now = time.monotonic()
        if now - self.printed < self.every and step + 1 < self.total:
            return
        speed = (step + 1 - self.first) / (now - self.started)
        figures = "  ".join(f"{key} {value / self.count:.4f}" for key, value in self.sums.items())
        left = (self.total - step - 1) / speed / 60
        print(f"{self.name} {step + 1}/{self.total}  {figures}  {speed:.2f} steps/s  {left:.1f} min left", flush=True)
        self.printed, self.count, self.sums = now, 0, {}


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes the state beside the old one and then replaces it, so that a kill leaves one of both whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path) -> dict | None:
    """The state that was saved last, or None."""
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


class Training:
    """The part of a training loop that is the same for every model: where it begins, its steps, its checkpoints.

    Args:
        path: the checkpoint; where it exists, model, optimizers and step are taken from it.
        model: what is saved.
        optims: what steps. Their rate is `lr` times a factor: a linear warm-up, flat, and a linear descent to zero
            over the last `descent` of all steps.
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
        self.begin: int = self.state.get("step", 0)
        if self.state:
            model.load_state_dict(self.state["model"])
            for optim, saved in zip(optims, self.state["optims"], strict=True):
                optim.load_state_dict(saved)
        self.progress = Progress(path.stem, steps, self.begin)

    def learning_rate(self, step: int, warmup: int = 100) -> float:
        """The rate of a step."""
        return self.lr * min(1.0, (step + 1) / warmup, max(0.0, (self.steps - step) / (self.descent * self.steps)))

    def finish_step(self, step: int, figures: dict[str, float], **extra: Any) -> None:
        """Steps the optimizers on the gradients there are, tells the figures, and saves when it is time.

        `extra` is saved beside model and optimizers, and found in `state` when the training goes on.
        """
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.learning_rate(step)
            optim.step()
        self.model.zero_grad(set_to_none=True)
        self.progress.log(step, **figures)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            saved = {"model": self.model.state_dict(), "optims": [optim.state_dict() for optim in self.optims]}
            save_checkpoint(self.path, saved | {"step": step + 1} | extra)
