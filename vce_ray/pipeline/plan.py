"""Time of a whole run on a number of equal devices, stage by stage: for each, the least and what is expected.

The expected times are those of drawing (sampling/plan.py) and training (training/plan.py), with the overheads that were
measured there. Images are drawn in whole batches; devices draw separate batches at the same time, and `--workers` of
them train.

Not counted: starting Ray, nodes and models; pixels, files and the judge; a captioner other than the model itself; safe
images that are drawn again because their caption mentions the concept. Prompts, pairs and the report take the driver
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from pydantic import ValidationError

from vce_ray.concepts.load import load_concept
from vce_ray.config import SamplingConfig, describe
from vce_ray.defaults import default_settings, merged
from vce_ray.devices import Device
from vce_ray.errors import UserError
from vce_ray.models.families import FAMILIES, reads_images
from vce_ray.models.shape import Shape, known_shape
from vce_ray.pairs.captioner import CAPTION_BATCH
from vce_ray.run_config import RunConfig
from vce_ray.sampling.plan import TEXT_OVERHEADS, Plan, limit_s, step_parts
from vce_ray.training.objectives import DEFAULT_METHOD
from vce_ray.training.plan import TIMES_LIMIT, TrainingPlan, plan_training, reference_s

CAPTION_TOKENS = 48
"""Tokens of the longest caption of a batch, one sentence: the batch is done when it is. `Janus.caption` allows more."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage does, and its seconds at the limit and as expected."""

    name: str
    work: str
    least_s: float
    expected_s: float


@dataclass(frozen=True)
class RunPlan:
    """Time of a run."""

    config: RunConfig
    gpus: int
    training: TrainingPlan
    stages: list[StagePlan]

    @property
    def least_s(self) -> float:
        """Seconds of all stages at the limit."""
        return sum(stage.least_s for stage in self.stages)

    @property
    def expected_s(self) -> float:
        """Seconds that all stages are expected to take."""
        return sum(stage.expected_s for stage in self.stages)


def run_settings(concept: str, base: str, given: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run of `erase`, from those that were given and the defaults of its concept and base.

    Args:
        base: the base model, which need not exist.

    Raises:
        UserError: the concept is unknown, or a setting is wrong.
    """
    wanted = load_concept(concept, base)
    method = given.get("train", {}).get("method") or wanted.train.get("method", DEFAULT_METHOD)
    defaults = default_settings(wanted, base, method)
    sampling = SamplingConfig().model_dump()
    try:
        return RunConfig.model_validate(
            merged(defaults | {"concept": concept, "base": base, "sampling": sampling}, given)
        )
    except ValidationError as error:
        raise UserError(describe(error)) from error


def plan_run(
    config: RunConfig, shape: Shape, device: Device, drawing: Plan, gpus: int, captions: bool = True
) -> RunPlan:
    """Plan a run.

    Args:
        drawing: the batches that images are drawn in.
        gpus: devices that draw at the same time; the training's `num_workers` of them train.
        captions: whether the model itself writes the captions.

    Raises:
        UserError: there are fewer devices than workers.
    """
    training = plan_training(shape, device, config.train)
    if training.workers > gpus:
        raise UserError(f"{training.workers} --workers need as many GPUs, and --gpus is {gpus}")
    pairs, images = config.pairs, config.pairs.num_pairs + config.pairs.num_keep
    judged = 2 * (config.evaluation.num_erase + config.evaluation.num_keep)
    modes = len(config.train.prompt_modes)

    write_least_s, write_expected_s = captioning_s(shape, device)

    def drawn(name: str, count: int, work: str, captioned: int = 0) -> StagePlan:
        draw = _rounds(count, drawing.batch, gpus)
        write = _rounds(captioned, CAPTION_BATCH, gpus) if captions else 0
        return StagePlan(
            name,
            work,
            draw * drawing.batch_s + write * write_least_s,
            draw * drawing.expected_batch_s + write * write_expected_s,
        )

    reference = [seconds / gpus for seconds in reference_s(shape, device, pairs.num_pairs, modes)]
    by_other = "" if captions else ", by another model, which is not counted"
    return RunPlan(
        config,
        gpus,
        training,
        [
            drawn("unsafe", images, f"{pairs.num_pairs} images of the concept, {pairs.num_keep} to keep"),
            drawn("captions", 0, f"{pairs.num_pairs} captions{by_other}", pairs.num_pairs),
            drawn("safe", pairs.num_pairs, f"{pairs.num_pairs} images, captioned again{by_other}", pairs.num_pairs),
            StagePlan(
                "reference",
                f"{pairs.num_pairs} pairs, each under {modes} prompt{'s' * (modes > 1)}",
                reference[0],
                reference[1],
            ),
            StagePlan(
                "training",
                f"{training.steps} steps on {training.workers} of {gpus}",
                training.steps * training.step_s,
                training.steps * training.expected_step_s,
            ),
            drawn("evaluation", judged, f"{judged} images, half of them before"),
        ],
    )


def captioning_s(shape: Shape, device: Device) -> tuple[float, float]:
    """Return the least and the expected seconds of captioning CAPTION_BATCH images with the model itself.

    The image and the question are read in one pass, then transformers' loop writes the caption. The vision tower is not
    counted, and the text head counts as the image head does.
    """
    context = shape.image_tokens + shape.prompt_tokens
    read = 2 * shape.step_parameters * CAPTION_BATCH * context / device.arithmetic
    step = limit_s(step_parts(shape, device, CAPTION_BATCH, context + CAPTION_TOKENS / 2))
    expected = TEXT_OVERHEADS[device.kind].step_s(step, shape.layers)
    return read + CAPTION_TOKENS * step, TIMES_LIMIT[device.kind] * read + CAPTION_TOKENS * expected


def captions_itself(model: str) -> bool:
    """Return whether a model captions images: a released one by name, whose first word is its family, or any base."""
    shape = known_shape(model)
    return FAMILIES[shape.name.partition("-")[0]].reads_images if shape else reads_images(model)


def _rounds(count: int, batch: int, gpus: int) -> int:
    """Return the batches that the busiest of several devices draws."""
    return ceil(ceil(count / batch) / gpus)
