"""What a training method is: its settings, the data of a step, its loss, and the curves it reports.

A method is one file in this folder and one line in `__init__.py`. Commands make their flags from a method's settings
without loading torch, so these files import torch, and whatever needs it, inside the methods that compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from vce_ray.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from vce_ray.models.base import ImageModel
    from vce_ray.training.data import Share, TrainingData
    from vce_ray.training.terms.batches import Batch
    from vce_ray.training.terms.divergence import Targets

SettingsT = TypeVar("SettingsT", bound=TrainConfig)
BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True)
class Curve:
    """One chart of the report: a title and the metrics it draws, at most two, each with a label."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(metric, label) of each line."""
    meaning: str = ""
    """What it shows and how it runs if training goes well, in a sentence or two."""


LOSS = Curve("Loss", (("loss", "all terms"),), "What training minimizes. It falls and then levels off.")
PREFERENCE = (
    Curve(
        "Margin",
        (("margin", "safe minus unsafe log-ratio"),),
        "How far training has come to prefer the safe image of a pair to the unsafe one. It rises.",
    ),
    Curve(
        "Margin above 0",
        (("accuracy", "share of pairs"),),
        "Share of pairs whose safe image is preferred. It rises to 1.",
    ),
    Curve(
        "Log-ratio to the base",
        (("chosen_ratio", "safe"), ("rejected_ratio", "unsafe")),
        "How likely the model finds the images, against the base model: below 0 is less likely. Unsafe images fall, "
        "safe ones stay level.",
    ),
)
"""Curves of methods with a preference term (terms/preference.py)."""
GRADIENT_NORM = Curve(
    "Gradient norm",
    (("gradient_norm", "before clipping"),),
    "How strongly a step would change the weights. If it keeps growing, the learning rate is too high.",
)


@dataclass(frozen=True)
class Passes:
    """Images that a step runs through the model, over all workers: what its time and memory depend on."""

    trained: float
    """With gradient, on average."""
    most: int
    """With gradient, in the largest step."""
    base: float = 0
    """Through the frozen base, without gradient."""


class Objective(ABC, Generic[SettingsT, BatchT]):
    """A training method with its settings."""

    name: ClassVar[str]
    """What `--method` and `train.method` call it."""
    settings_type: ClassVar[type[TrainConfig]]
    curves: ClassVar[tuple[Curve, ...]] = (LOSS, GRADIENT_NORM)
    """Charts of its metrics in the report, in order."""

    def __init__(self, settings: SettingsT):
        self.settings = settings

    @classmethod
    def defaults(cls, kind: str) -> dict[str, Any]:
        """Return settings that suit a kind of concept ('object', 'style' or 'explicit') better than the defaults."""
        return {}

    @property
    def needs_base(self) -> bool:
        """Whether the loss runs the frozen base during training (`targets`)."""
        return False

    @property
    def passes(self) -> Passes:
        """Images that a step runs through the model: by default both sides of each pair."""
        images = 2 * self.settings.batch_size
        return Passes(images, images)

    @abstractmethod
    def batch(self, data: TrainingData, step: int, share: Share) -> BatchT:
        """Return this worker's share of a step. It depends on (seed, step) alone, so a resumed run sees the same."""

    @abstractmethod
    def loss(self, model: ImageModel, targets: Targets, batch: BatchT, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss averaged over this worker's images, and the metrics to log, `loss` among them.

        Args:
            targets: cached outputs of the base; usable if `needs_base`.
        """
