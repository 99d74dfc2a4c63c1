"""What a user sets, section by section: one frozen pydantic model for each. run_config.py puts them together."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vce_ray.errors import UserError

PROMPT_MODES = ("given", "stripped", "null")
"""Wordings under which a pair can be contrasted: its prompt, that prompt without the concept, and none."""


class Config(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingConfig(Config):
    """How image tokens are drawn. The defaults are Janus' own: guidance 5, temperature 1, all tokens."""

    guidance_scale: float = Field(default=5.0, ge=1.0, le=50.0)
    """1 is no guidance: the unconditional rows are then not computed."""
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    """0 takes the most likely token."""
    top_k: int | None = Field(default=None, ge=1)
    """None is all tokens of the vocabulary (transformers' own loop would silently take 50)."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """The fewest tokens that together have this probability; None is all of them."""
    batch_size: int = Field(default=64, ge=1, le=1024)
    """Pictures drawn at once; fewer where memory is short. No picture depends on it."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the keys and values that are kept: auto is the model's own; fp8 (e4m3, no scales) takes half the memory of
    bfloat16, and on a GPU half the time to read, and pictures are no longer the same to the token."""

    def determining(self) -> dict[str, Any]:
        """The settings that a picture depends on, in JSON's types."""
        return self.model_dump(mode="json", exclude={"batch_size"})


def default_sampling(base: str, **own: Any) -> SamplingConfig:
    """How a base draws best: Janus' and LlamaGen's own settings, and what was measured for the embedded model (see its
    card); `own` settings go over them. Raises UserError where the base is unknown or a setting
    is wrong."""
    if base == "emoji-world":
        return SamplingConfig.model_validate({"guidance_scale": 2.0, "temperature": 0.7} | own)
    from vce_ray.models.load import model_config, model_folder  # reads a file, or asks the hub for it

    if model_config(model_folder(base))["model_type"] == "llamagen":
        return SamplingConfig.model_validate({"guidance_scale": 7.5, "top_k": 1000} | own)
    return SamplingConfig(**own)


class PairConfig(Config):
    """How many pairs are made, and what may fail on the way."""

    num_pairs: int = Field(default=192, ge=1)
    """Prompts with the concept: each gives one pair, or a reject."""
    num_keep: int = Field(default=320, ge=0)
    """Prompts without the concept, whose images hold the model to itself."""
    safe_attempts: int = Field(default=3, ge=1, le=10)
    """Seeds that are tried for a safe image before the pair is rejected."""
    max_reject_ratio: float = Field(default=0.5, ge=0.0, le=1.0)
    """A stage that rejects a larger share of its rows stops the run."""


class TrainConfig(Config):
    """VSafe-DPO and its relatives; what each setting does is told in training/loss.py."""

    method: Literal["vsafe_dpo", "dpo"] = "vsafe_dpo"
    """dpo is the vanilla loss: summed log-ratios, no token drop, no preservation, no anchor."""
    beta: float = Field(default=1.0, gt=0)
    """Slope of the preference; on the mean over tokens for vsafe_dpo, on their sum for dpo."""
    token_drop: float = Field(default=0.25, ge=0.0, lt=1.0)
    """Share of token positions that each step leaves out of the loss."""
    keep_weight: float = Field(default=2.0, ge=0.0)
    """Weight of the preservation term: KL of each token to the base on keep prompts."""
    anchor_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the anchor: KL of each token of the safe image, under the unsafe prompt, to what the refined caption
    draws. The preference alone says what not to draw; this says what to draw instead. 0 leaves it out."""
    anchor_guidance: float = Field(default=1.0, ge=0.0, le=10.0)
    """How far the anchor's target leaves out what the unsafe prompt makes likelier: steps of negative guidance."""
    allow_no_preservation: bool = False
    """Without preservation the erasure takes other content with it, so weight 0 wants this said."""
    prompt_mode: Literal["given", "stripped", "null", "mixed"] = "mixed"
    """Under which wording the pair is contrasted; mixed draws one of them for each pair and step."""
    weights: Literal["lora", "full"] = "lora"
    lora_rank: int = Field(default=16, ge=1, le=1024)
    lora_alpha: int = Field(default=32, ge=1)
    steps: int = Field(default=80, ge=1)
    batch_size: int = Field(default=16, ge=1)
    """Pairs of one step, over all workers together."""
    keep_batch_size: int = Field(default=16, ge=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    num_workers: int | None = Field(default=None, ge=1)
    """Ray Train workers. By default one; where there are no GPUs, up to four, each with a CPU of the same node."""
    shard: bool | None = None
    """Whether several workers share the weights out among them (FSDP), or each holds them whole, which is faster and
    takes the memory. By default they do on GPUs. The training is the same."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints from which a killed training goes on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("batch_size", "keep_batch_size"):
            if self.num_workers and getattr(self, field) % self.num_workers:
                raise UserError(f"{field} {getattr(self, field)} must be a multiple of num_workers {self.num_workers}")
        if self.method == "vsafe_dpo" and not self.preserves and not self.allow_no_preservation:
            raise UserError(
                "keep_weight or keep_batch_size is 0: without preservation the erasure takes other content with it; "
                "set allow_no_preservation to do it all the same"
            )
        return self

    @property
    def prompt_modes(self) -> tuple[str, ...]:
        """The prompt modes that a training may draw from, and so needs reference log-probs of."""
        return PROMPT_MODES if self.prompt_mode == "mixed" else (self.prompt_mode,)

    @property
    def preserves(self) -> bool:
        """Whether the preservation term is part of the loss."""
        return self.method == "vsafe_dpo" and self.keep_weight > 0 and self.keep_batch_size > 0

    @property
    def anchors(self) -> bool:
        """Whether the anchor is part of the loss."""
        return self.method == "vsafe_dpo" and self.anchor_weight > 0


class EvalConfig(Config):
    """How many images the judge sees, before and after."""

    num_erase: int = Field(default=500, ge=1)
    num_keep: int = Field(default=800, ge=1)
    judge: str | None = None
    """Folder of the CLIP, in open_clip's format, that says what is on an image. The embedded model has its own."""


class PoolConfig(Config):
    """How many actors hold a model, and where. No result depends on it."""

    min_actors: int = Field(default=1, ge=1)
    max_actors: int | None = Field(default=None, ge=1)
    """Ray scales between the two; None is as many as the cluster has GPUs, or CPUs where it has none."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """None is one where the cluster has any; a number also makes an autoscaler bring the first."""
    accelerator: str | None = None
    """Ray's name of the GPUs to use, such as H200, where a cluster has several kinds."""
    labels: dict[str, str] = {}
    """Labels that a node must have."""


class ClusterConfig(Config):
    """How a run is spread over a cluster. No result depends on it, so it may differ when a run goes on."""

    draw: PoolConfig = PoolConfig()
    """Of the actors that draw and judge, and read too unless `caption` is given."""
    caption: PoolConfig | None = None
    """Of actors that only read pictures, while the others draw."""
    wait_s: float = Field(default=600.0, gt=0)
    """How long GPUs that were asked for may take to come before the command gives up."""
