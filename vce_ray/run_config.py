"""The settings of one run: what is erased from what, and the sections of config.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from vce_ray.config import (
    ClusterConfig,
    Config,
    EvalConfig,
    PairConfig,
    SamplingConfig,
    TrainConfig,
    default_sampling,
)


class RunConfig(Config):
    """One run: one concept erased from one base model."""

    concept: str
    base: str = "emoji-world"
    captioner: str | None = None
    """Describes the base's images in its place: a Janus, named as a base is; 'vllm:' and a vision model's hub id or
    folder; or https://host/v1#model, an endpoint of chat completions (pairs/captioner.py)."""
    refiner: str | None = None
    """Endpoint of chat completions, https://host/v1#model, that takes the concept out of captions; the rules go over
    what it says (pairs/refine.py). Without it they do it alone."""
    store: str = "runs"
    name: str | None = None
    """Name of the run's prefix below the store; the concept's and the method's by default."""
    seed: int = Field(default=0, ge=0)
    pairs_of: tuple[str, ...] = ()
    """Names of runs in the same store whose pair sets are trained on, in place of new ones (pairs/adopt.py)."""
    prompts_file: str | None = None
    """A user's own prompts for the concept, one per line, in place of those made from its templates."""
    sampling: SamplingConfig
    """default_sampling(base) where it is not given."""
    pairs: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_sampling(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"sampling": default_sampling(values.get("base", "emoji-world"))} | values

    @property
    def reader(self) -> str:
        """The captioner that describes images."""
        return self.captioner or self.base

    if TYPE_CHECKING:  # types do not see that the validator fills in what is left out

        def __init__(self, **values: Any) -> None: ...
