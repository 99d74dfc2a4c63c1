"""Settings of one run: what to erase from which base, and the sections of config.py.

Pure: constructing a RunConfig reads no file and asks no server. pipeline/preflight.py looks up what it needs.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from vce_ray.config import (
    EMBEDDED,
    ClusterConfig,
    Config,
    EvalConfig,
    PairConfig,
    SamplingConfig,
    TrainConfig,
    describe,
)
from vce_ray.errors import UserError
from vce_ray.training.objectives import DEFAULT_METHOD, objective_type, train_config
from vce_ray.training.objectives.vsafe_dpo import VSafeDPOConfig

UNUSED_BY_DPO = frozenset(
    {"token_drop", "keep_weight", "keep_batch_size", "anchor_weight", "anchor_guidance", "allow_no_preservation"}
)
"""Settings of other methods that version 0.1 recorded for vanilla DPO, which never used them."""


def _by_method(value: Any) -> Any:
    return train_config(value) if isinstance(value, dict) else value


class RunConfig(Config):
    """One run: one concept erased from one base model."""

    concept: str
    """Concept of the catalogue, or path of a YAML file."""
    base: str = EMBEDDED
    """Base model: emoji-world, a checkpoint folder, s3://bucket/folder, gs://bucket/folder, owner/name or
    owner/name@revision."""
    captioner: str | None = None
    """Model that captions images instead of the base: a Janus; vllm:MODEL; or a chat completions endpoint,
    https://host/v1#model, with its token in VCE_RAY_CAPTIONER_TOKEN."""
    refiner: str | None = None
    """Chat completions endpoint, https://host/v1#model, that removes the concept from captions before the rules do; its
    token goes in VCE_RAY_REFINER_TOKEN."""
    store: str = "runs"
    """Where runs are stored: a local folder, s3://bucket/prefix or gs://bucket/prefix."""
    name: str | None = None
    """Name of the run. Default: concept, method and seed."""
    seed: int = Field(default=0, ge=0)
    """Seed of prompts, sampling and training."""
    pairs_of: tuple[str, ...] = ()
    """Train on the pair set of this run of the same store instead of making one; may be repeated."""
    prompts_file: str | None = Field(default=None, json_schema_extra={"flag": "--prompts"})
    """File of prompts for the concept to use instead of its templates: text with one per line, a .csv, .tsv, .json,
    .jsonl or .parquet file, or a file of a published set, which is recognized by its columns."""
    prompt_column: str = "prompt"
    """Column of the prompts in a file that is a table."""
    prompt_set: str | None = None
    """Published set that the prompts file is of, such as i2p; its columns and size are checked then."""
    prompt_category: str | None = None
    """Use prompts of this category of the set alone, such as sexual, or with a number of at least so much in a column,
    such as nudity_percentage>=50."""
    track: tuple[str, ...] = ()
    """Also show the run in tensorboard, mlflow or wandb, each of which needs the extra of its name; may be repeated."""
    sampling: SamplingConfig
    pairs: PairConfig = PairConfig()
    train: SerializeAsAny[Annotated[TrainConfig, BeforeValidator(_by_method)]] = VSafeDPOConfig()
    evaluation: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def from_record(cls, recorded: dict[str, Any]) -> Self:
        """Read the settings in a run.json, including one written by version 0.1.

        Settings that were added since get their defaults.

        Raises:
            UserError: they are not settings of this version.
        """
        train = recorded.get("train", {})
        if objective_type(train.get("method", DEFAULT_METHOD)).name == "dpo":
            train = {key: value for key, value in train.items() if key not in UNUSED_BY_DPO}
        try:
            return cls.model_validate(recorded | {"train": train})
        except ValidationError as error:
            raise UserError(
                f"the run was made with settings that this version does not have ({describe(error)})"
            ) from error

    def recorded(self) -> dict[str, Any]:
        """Return the settings that results depend on, as run.json holds them."""
        return self.model_dump(mode="json", exclude={"store", "track", "cluster"})

    @property
    def captioning_model(self) -> str:
        """The model that captions images: the captioner, or the base."""
        return self.captioner or self.base
