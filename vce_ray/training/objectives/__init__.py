"""Training methods, one per file. To add one, write its file and list its class here."""

from __future__ import annotations

from typing import Any

from vce_ray.config import TrainConfig
from vce_ray.errors import UserError, quote
from vce_ray.training.objectives.base import Objective
from vce_ray.training.objectives.dpo import DPO
from vce_ray.training.objectives.vsafe_dpo import VSafeDPO

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        VSafeDPO,
        DPO,
    )
}
DEFAULT_METHOD = VSafeDPO.name

__all__ = ["DEFAULT_METHOD", "OBJECTIVES", "Objective", "objective_for", "objective_type", "train_config"]


def objective_type(method: str) -> type[Objective]:
    """Return the class of a training method. Raises UserError for an unknown name."""
    if not isinstance(method, str) or method not in OBJECTIVES:
        raise UserError(f"unknown training method {quote(method)}: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[method]


def objective_for(settings: TrainConfig) -> Objective:
    """Return the training method with these settings."""
    return objective_type(settings.method)(settings)


def train_config(values: dict[str, Any]) -> TrainConfig:
    """Validate the settings of a training; `method` decides which keys there are.

    Raises:
        UserError: the method is unknown.
        pydantic.ValidationError: a setting is unknown to the method or out of range.
    """
    return objective_type(values.get("method", DEFAULT_METHOD)).settings_type.model_validate(values)
