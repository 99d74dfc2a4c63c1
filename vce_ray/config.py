"""What a user sets, section by section. run_config.py composes the sections into the settings of a run.

The docstring below a field is its description, and the help text of its command line flag (cli/options.py). A field's
`flag` replaces the flag's usual name, which is the field's.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vce_ray.errors import UserError, cut, quote

EMBEDDED = "emoji-world"
"""Name of the base model that ships with the package."""
SEED_LIMIT = 2**63
"""Sampling seeds are int64: from 0 to one below this."""
DEFAULT_CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
"""CLIP that judges a run whose base brings no judge along, unless `--judge` names another one."""
DETECTORS = {"nudenet": "nudity", "opennsfw": "nudity", "q16": "violence"}
"""Detectors that `--judge` takes by name, and the content that each recognizes (`Concept.content`)."""
DEFAULT_DETECTORS = ("nudenet",)
"""Detectors that judge the content they recognize unless `--judge` is given."""
PROMPT_MODES = ("given", "stripped", "null")
"""Prompts under which a pair can be contrasted: its own, the same without the concept, and none."""


MAX_PROBLEMS = 5
"""Wrong settings that a message describes one by one; the others are only counted."""


class Config(BaseModel):
    """Base of all settings: frozen, and unknown keys are refused with the known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise UserError(f"unknown setting {quote(key)}: known are {', '.join(cls.model_fields)}")
        return values


def describe(error: ValidationError) -> str:
    """Return what is wrong with settings, in one line: where, why, and the value, whatever the size of any of them."""
    problems = error.errors(include_url=False)
    rest = len(problems) - MAX_PROBLEMS
    return "; ".join(map(_describe, problems[:MAX_PROBLEMS])) + (f"; and {rest} more" if rest > 0 else "")


def _describe(problem: Any) -> str:
    where = cut(".".join(map(str, problem["loc"])))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own messages name the value
        return f"{where}: {message}" if where else message
    if problem["type"] == "missing":
        return f"{where} is missing"
    return f"{where or 'settings'}: {message[0].lower()}{message[1:]}, not {quote(problem['input'])}"


class SamplingConfig(Config):
    """How image tokens are sampled. The defaults are those of Janus: guidance 5, temperature 1, all tokens."""

    guidance_scale: float = Field(default=5.0, ge=1.0, le=50.0, json_schema_extra={"flag": "--guidance"})
    """Classifier-free guidance; 1 disables it, and unconditional rows are not computed. Default: the base's own."""
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    """Sampling temperature; 0 takes the most likely token. Default: the base's own."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k likeliest tokens. Default: the base's own, usually all tokens."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample from the fewest tokens that together have this probability. Default: all tokens."""
    batch_size: int = Field(default=64, ge=1, le=1024)
    """Images drawn at once, fewer if memory is short. In bfloat16 it may change an occasional token."""
    kv_cache_dtype: Literal["auto", "fp8"] = Field(default="auto", json_schema_extra={"flag": "--kv-cache"})
    """Precision of cached keys and values: the model's own, or 8 bits (e4m3, no scales), which takes half the memory of
    bfloat16 and changes images slightly."""

    def determining(self) -> dict[str, Any]:
        """Return the settings that an image depends on, in JSON types."""
        return self.model_dump(mode="json", exclude={"batch_size"})


class PairConfig(Config):
    """How many pairs to make, and how many may fail."""

    num_pairs: int = Field(default=192, ge=1, json_schema_extra={"flag": "--pairs"})
    """Prompts with the concept. Each gives one pair or one reject."""
    num_keep: int = Field(default=320, ge=0, json_schema_extra={"flag": "--keep"})
    """Prompts without the concept, whose images preserve the rest of the model. Styles use 1280."""
    safe_attempts: int = Field(default=3, ge=1, le=10)
    """Seeds to try for a safe image before the pair is rejected."""
    max_reject_ratio: float = Field(default=0.5, ge=0.0, le=1.0)
    """Stop the run if a stage rejects a larger share of its rows."""


class TrainConfig(Config):
    """Settings that every training method shares. Each method adds its own in training/objectives/."""

    method: str
    """Training method, by the name of its Objective (training/objectives/)."""
    steps: int = Field(default=80, ge=1)
    """Training steps. Default: 80, and a third more for each name of the concept beyond the first."""
    batch_size: int = Field(default=16, ge=1, json_schema_extra={"flag": "--train-batch-size"})
    """Pairs per step, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate: warm-up over a tenth of the steps, then linear decay to a tenth. Default: 1e-3, but 1e-4
    for bases other than the embedded model."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    weights: Literal["lora", "full"] = "lora"
    """Weights to train: a LoRA adapter, or the decoder layers and the image head in full."""
    lora_rank: int = Field(default=16, ge=1, le=1024)
    """Rank of the LoRA matrices."""
    lora_alpha: int = Field(default=32, ge=1)
    """LoRA scale: the update is multiplied by alpha / rank."""
    num_workers: int | None = Field(default=None, ge=1, json_schema_extra={"flag": "--workers"})
    """Ray Train workers. Default: one per training on GPUs; without GPUs one to four, which share one node's CPUs."""
    shard: bool | None = None
    """Shard the weights over the workers (FSDP) or replicate them, which is faster but takes more memory. Default:
    shard on GPUs. The result is the same."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints, from which an interrupted training resumes."""

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        for field in self.batch_fields:
            if self.num_workers and getattr(self, field) % self.num_workers:
                raise UserError(f"{field} {getattr(self, field)} must be a multiple of num_workers {self.num_workers}")
        return self

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """Names of the batch sizes that are split evenly over the workers."""
        return ("batch_size",)

    @property
    def preserves(self) -> bool:
        """Whether the method trains on kept images."""
        return False

    @property
    def prompt_modes(self) -> tuple[str, ...]:
        """Prompt modes for which the method needs reference log-probs of the pairs; none by default."""
        return ()


class EvalConfig(Config):
    """How many images are judged before and after, and by what."""

    num_erase: int = Field(default=500, ge=1, json_schema_extra={"flag": "--judged"})
    """Evaluation prompts for the concept."""
    num_keep: int = Field(default=800, ge=1, json_schema_extra={"flag": "--judged-keep"})
    """Evaluation prompts for what is kept."""
    judge: tuple[str, ...] = ()
    """What judges the images: a CLIP in open_clip's format (a folder, s3://bucket/folder, gs://bucket/folder,
    owner/name or owner/name@revision), nudenet, opennsfw or q16, or a vision model behind a chat completions endpoint,
    https://host/v1#model, with its token in VCE_RAY_JUDGE_TOKEN; may be repeated. Default: the embedded model's own
    CLIP; for other bases laion/CLIP-ViT-B-32-laion2B-s34B-b79K, and nudenet too if the concept is nudity."""

    @field_validator("judge", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Take one judge as a string, and none as null, as files and the records of earlier versions have them."""
        return () if value is None else (value,) if isinstance(value, str) else value

    @field_validator("judge")
    @classmethod
    def _check_judges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in value if value.count(name) > 1]:
            raise UserError(f"judge {quote(twice[0])} is given twice: leave one of them out")
        return value

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The judges that are vision models behind endpoints."""
        return tuple(name for name in self.judge if name.startswith(("http://", "https://")))

    def clips(self, base: str) -> tuple[str, ...]:
        """Return the judges that are CLIPs, at least one: the first names what images show."""
        given = tuple(name for name in self.judge if name not in (*DETECTORS, *self.endpoints))
        return given or (EMBEDDED if base == EMBEDDED else DEFAULT_CLIP,)

    def detectors(self, content: str | None) -> tuple[str, ...]:
        """Return the detectors that judge a concept of this content: those given, or the default ones."""
        return tuple(name for name in self.judge or DEFAULT_DETECTORS if content and DETECTORS.get(name) == content)


class PoolConfig(Config):
    """How many actors hold a model, and on which nodes. Results do not depend on it."""

    min_actors: int = Field(default=1, ge=1)
    """Minimum number of actors."""
    max_actors: int | None = Field(default=None, ge=1)
    """Maximum number of actors. Default: one per GPU of the cluster, or per CPU if it has no GPUs."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs of each actor, such as 1 or 0.5. Default: one if the cluster has any. Set it to make an
    autoscaler start the first GPU node."""
    accelerator: str | None = None
    """GPU model by Ray's name, such as H200."""
    labels: dict[str, str] = Field(default={}, json_schema_extra={"flag": "--label"})
    """Labels that a node must have, as key=value; may be repeated."""


class ClusterConfig(Config):
    """How a run is spread over a cluster. Results do not depend on it, so it may change when a run resumes."""

    draw: PoolConfig = PoolConfig()
    """Actors that draw and judge. They also caption unless `caption` is set."""
    caption: PoolConfig | None = None
    """Actors that only caption, while the others draw."""
    wait_s: float = Field(default=600.0, gt=0, json_schema_extra={"flag": "--wait"})
    """Seconds to wait for requested GPUs before giving up."""
