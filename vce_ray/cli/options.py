"""Options that commands share, and the settings of a run that they make."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from typing import Annotated, Any, Literal

import typer

from vce_ray.config import EvalConfig, PairConfig, default_sampling
from vce_ray.errors import UserError

Store = Annotated[str, typer.Option(help="Where runs lie: a local folder, s3://bucket/prefix or gs://bucket/prefix.")]
Base = Annotated[
    str, typer.Option(help="Base model: emoji-world, a checkpoint folder, s3:// or gs://..., owner/name[@revision].")
]
Captioner = Annotated[
    str | None,
    typer.Option(
        help="Describes images in place of the base: a Janus; vllm:MODEL; or https://host/v1#model, with its token in "
        "VCE_RAY_CAPTIONER_TOKEN."
    ),
]
Refiner = Annotated[
    str | None,
    typer.Option(
        help="Takes the concept out of captions before the rules do: https://host/v1#model, with its token in "
        "VCE_RAY_REFINER_TOKEN."
    ),
]
Judge = Annotated[str | None, typer.Option(help="CLIP folder that judges; the embedded model has its own.")]
PairsOnly = Annotated[
    bool, typer.Option("--pairs-only", help="Stop once the pair set is published; without it the same run goes on.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of prompts, sampling and training.")]
Method = Annotated[Literal["vsafe_dpo", "dpo"], typer.Option(help="The loss.")]
RejectRatio = Annotated[
    float, typer.Option("--max-reject-ratio", min=0, max=1, help="Share of its rows that a stage may reject.")
]
Pairs = Annotated[int, typer.Option(min=1, help="Prompts with the concept.")]
Keep = Annotated[int | None, typer.Option(min=0, help="Prompts of what must be kept; by default 320, for styles 1280.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Training steps; by default 80, more for a style or many names.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Ray Train workers of a training; by default 1, without GPUs up to 4.")
]
Weights = Annotated[Literal["lora", "full"], typer.Option(help="What is trained.")]
Judged = Annotated[int, typer.Option(min=1, help="Images with the concept that are judged.")]
JudgedKeep = Annotated[int, typer.Option(min=1, help="Kept images that are judged.")]
KvCache = Annotated[
    Literal["auto", "fp8"],
    typer.Option("--kv-cache", help="Keys and values: as the model has them, or in 8 bits; pictures differ a little."),
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Images drawn at once; fewer where memory is short. None depends on it.")
]
Actors = Annotated[
    str | None, typer.Option(help="Actors that draw, such as 8, or 2:16 for Ray to scale between.", show_default="all")
]
CaptionActors = Annotated[
    str | None, typer.Option(help="Actors that only read images, such as 2 or 1:4, while the others draw.")
]
Gpus = Annotated[float | None, typer.Option(min=0, help="GPUs of an actor, such as 1 or 0.5.")]
Accelerator = Annotated[str | None, typer.Option(help="Kind of GPU that draws, by Ray's name, such as H200.")]
CaptionAccelerator = Annotated[str | None, typer.Option(help="Kind of GPU of the actors that only read.")]
Label = Annotated[list[str] | None, typer.Option(help="Label of the nodes to use, key=value.")]
Wait = Annotated[float, typer.Option(min=1, help="Seconds that GPUs may take to come before giving up.")]

_PAIRS, _JUDGED = PairConfig(), EvalConfig()


def run_settings(
    *,
    store: Store = "runs",
    base: Base = "emoji-world",
    captioner: Captioner = None,
    refiner: Refiner = None,
    judge: Judge = None,
    seed: Seed = 0,
    method: Method = "vsafe_dpo",
    pairs: Pairs = _PAIRS.num_pairs,
    keep: Keep = None,
    max_reject_ratio: RejectRatio = _PAIRS.max_reject_ratio,
    steps: Steps = None,
    workers: Workers = None,
    weights: Weights = "lora",
    judged: Judged = _JUDGED.num_erase,
    judged_keep: JudgedKeep = _JUDGED.num_keep,
    batch_size: Batch = None,
    kv_cache: KvCache = "auto",
    actors: Actors = None,
    caption_actors: CaptionActors = None,
    gpus_per_actor: Gpus = None,
    accelerator: Accelerator = None,
    caption_accelerator: CaptionAccelerator = None,
    label: Label = None,
    wait: Wait = 600,
) -> dict[str, Any]:
    """Options as keys of RunConfig, all but the concept; what depends on it (defaults.py) stays out where not given."""
    train = {"method": method, "num_workers": workers, "weights": weights}
    sampling = default_sampling(base, kv_cache_dtype=kv_cache, **{"batch_size": batch_size} if batch_size else {})
    return {
        "base": base,
        "captioner": captioner,
        "refiner": refiner,
        "store": store,
        "seed": seed,
        "sampling": sampling.model_dump(),
        "pairs": {"num_pairs": pairs, "max_reject_ratio": max_reject_ratio}
        | ({} if keep is None else {"num_keep": keep}),
        "train": train | ({"steps": steps} if steps else {}),
        "evaluation": {"num_erase": judged, "num_keep": judged_keep, "judge": judge},
        "cluster": cluster_settings(
            actors, caption_actors, gpus_per_actor, accelerator, caption_accelerator, label, wait
        ),
    }


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `run_settings` beside its own. It is called with what they make, and its own."""
    shared = signature(run_settings, eval_str=True).parameters
    own = [option for option in signature(command, eval_str=True).parameters.values() if option.name != "settings"]

    @wraps(command)
    def with_settings(**given: Any) -> None:
        settings = run_settings(**{name: given.pop(name) for name in shared})
        command(settings, **given)

    every = [*own, *shared.values()]
    with_settings.__signature__ = Signature(every)  # pyright: ignore[reportAttributeAccessIssue]
    with_settings.__annotations__ = {option.name: option.annotation for option in every}
    return with_settings


def cluster_settings(
    actors: str | None,
    caption_actors: str | None,
    gpus_per_actor: float | None,
    accelerator: str | None,
    caption_accelerator: str | None,
    label: list[str] | None,
    wait: float,
) -> dict[str, Any]:
    """Options as keys of ClusterConfig.

    Raises:
        UserError: bounds that are no numbers, or a label without '='.
    """
    labels = {}
    for pair in label or ():
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise UserError(f"label {pair!r} is no key=value")
        labels[key] = value
    shared = {"gpus_per_actor": gpus_per_actor, "labels": labels}
    draw = shared | {"accelerator": accelerator} | _bounds("actors", actors)
    caption = None
    if caption_actors or caption_accelerator:
        caption = shared | {"accelerator": caption_accelerator} | _bounds("caption-actors", caption_actors)
    return {"draw": draw, "caption": caption, "wait_s": wait}


def _bounds(option: str, value: str | None) -> dict[str, int]:
    if value is None:
        return {}
    low, colon, high = value.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()):
        raise UserError(f"--{option} {value!r}: give a number of actors, such as 8, or bounds, such as 2:16")
    return {"min_actors": int(low), "max_actors": int(high if colon else low)}
