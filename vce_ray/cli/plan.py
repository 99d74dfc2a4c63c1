"""The command vce-ray plan: which GPU, what fits on it, how long a run takes and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd, inf
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vce_ray.cli.options import with_settings
from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.devices import CARDS, Device, version
from vce_ray.errors import UserError

if TYPE_CHECKING:
    from vce_ray.models.shape import Shape
    from vce_ray.pipeline.plan import RunPlan
    from vce_ray.run_config import RunConfig
    from vce_ray.sampling.plan import Plan
    from vce_ray.training.plan import TrainingPlan

BASIS = {
    "sheet": "expected: fitted to one H200 (docs/decoder.md, docs/run.md), assumed for other GPUs; whole runs of large "
    "models are not measured",
    "gpu": "expected: fitted to one H200 (docs/decoder.md, docs/run.md); whole runs of large models are not measured",
    "cpu": "expected: fitted to two models on two cores (docs/decoder.md); rough",
}


@with_settings("pairs", "train", "evaluation")
def plan(
    settings: dict[str, Any],
    concept: Annotated[str, typer.Argument(help="The concept of the run, whose defaults are used.")] = "deer",
    model: Annotated[str, typer.Option(help="A known model by name (--list), or a base model.")] = EMBEDDED,
    device: Annotated[str, typer.Option(help="A known GPU by name (--list), or 'this', which is measured.")] = "this",
    show_list: Annotated[bool, typer.Option("--list", help="List known models and GPUs with their figures.")] = False,
    batch: Annotated[int | None, typer.Option(help="Images at once. Default: 64, or fewer if memory is short.")] = None,
    guidance: Annotated[bool, typer.Option(help="Use guidance, which doubles the rows.")] = True,
    kv_cache: Annotated[
        Literal["auto", "fp8"], typer.Option("--kv-cache", help="Precision of cached keys and values.")
    ] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision of the weights. Default: that of the model's files."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the run. Default: as many as --workers, or 1.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of a GPU for an hour, in any currency.")] = None,
) -> None:
    """Estimate memory, time and cost of drawing, training and a whole run on GPUs, present or not.

    Shows the arithmetic, and what to change if something does not fit; the exit code is then 2.
    """
    if show_list:
        typer.echo("\n".join(known_lines()))
        return
    for name, value in (("batch", batch), ("gpus", gpus)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    if price is not None and not 0 <= price < inf:
        raise UserError(f"--price {price:g}: give 0 or more for a GPU-hour")
    if device != "this" and device not in CARDS:
        raise UserError(f"unknown device {device!r}: known are this, {', '.join(CARDS)}")

    from vce_ray.pipeline.plan import captions_itself, plan_run, run_settings
    from vce_ray.sampling.plan import plan as plan_drawing

    config = run_settings(concept, model, settings)
    shape = model_shape(model)
    shape = replace(shape, kv_cache_dtype=kv_cache, dtype=dtype or shape.dtype)
    limits = CARDS[device].device(shape.dtype) if device != "this" else this_device(shape.dtype)
    drawing = plan_drawing(shape, limits, batch or usual_batch(shape, limits, guidance), guidance)
    run = plan_run(config, shape, limits, drawing, gpus or config.train.num_workers or 1, captions_itself(model))
    typer.echo("\n".join([device_line(shape, limits), *drawing_lines(shape, limits, drawing, guidance)]))
    typer.echo("\n".join(training_lines(shape, limits, config, run.training)))
    if not drawing.fits or not run.training.fits:
        raise typer.Exit(2)
    typer.echo("\n".join(run_lines(run, limits, price)))


def model_shape(model: str) -> Shape:
    """Return the shape of a known model, or load a base model for its shape. Raises UserError if it is neither."""
    from vce_ray.models.load import load_model
    from vce_ray.models.shape import SHAPES, known_shape

    if shape := known_shape(model):
        return shape
    try:
        return replace(load_model(model, device="cpu").shape, name=model)
    except UserError as error:
        raise UserError(f"{error}. Known without its files: {', '.join(SHAPES)}") from error


def this_device(dtype: str) -> Device:
    """Measure the GPU of this machine, or its CPU if it has none."""
    import torch

    from vce_ray.sampling.measure import measure_device

    return measure_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype))


def usual_batch(shape: Shape, device: Device, guided: bool) -> int:
    """Return the batch that a run draws by default: fewer images if memory is short, but at least one."""
    from vce_ray.sampling.memory import fitting_batch, whole_batch
    from vce_ray.sampling.plan import slot_block

    usual = SamplingConfig().batch_size
    fitting = fitting_batch(shape, device.memory, guided, packs=device.packs, slot_block=slot_block(device))
    return usual if fitting >= usual else max(1, fitting) if device.kind == "cpu" else whole_batch(fitting)


# What is printed ------------------------------------------------------------------------------------------------------


def known_lines() -> Iterator[str]:
    """List known models and GPUs with their figures."""
    from vce_ray.models.shape import BYTES, SHAPES
    from vce_ray.sampling.plan import needed_memory

    yield f"{'model':<16} {'weights':>9}  {'read per step':>13}  {'image':>11}  {'cache of an image':>17}  {'needs':>8}"
    for shape in SHAPES.values():
        weights, slots = shape.step_parameters + shape.idle_parameters, shape.prompt_tokens + shape.image_tokens
        yield (
            f"{shape.name:<16} {weights * BYTES[shape.dtype] / 1e9:>6.1f} GB  "
            f"{shape.step_parameters * BYTES[shape.dtype] / 1e9:>10.1f} GB  {shape.image_tokens:>4} tokens  "
            f"{2 * slots * shape.cache_bytes / 1e9:>14.2f} GB  {needed_memory(shape) / 1e9:>5.1f} GB"
        )
    yield "(bfloat16, with guidance; needs: to draw one image at a time)"
    yield ""
    yield f"{'device':<10} {'memory':>7}  {'bandwidth':>9}  {'16 bit':>12}  {'float32':>12}  capability"
    for card in CARDS.values():
        uses = {"bfloat16": "bfloat16", "fp8": "fp8 cache"}
        lacks = [use for dtype, use in uses.items() if not card.device(dtype).supports(dtype)]
        yield (
            f"{card.name:<10} {card.memory / 1e9:>4.0f} GB  {card.bandwidth / 1e12:>4.2f} TB/s  "
            f"{card.half / 1e12:>5.0f} Tflop/s  {card.single / 1e12:>5.1f} Tflop/s  {version(card.capability)}"
            + (f", no {' and no '.join(lacks)}" if lacks else "")
        )
    yield "(data sheets: dense products, without sparsity and TF32; 'this' measures the machine)"


def device_line(shape: Shape, device: Device) -> str:
    """Say what is planned for."""
    cache = "" if shape.kv_cache_dtype == "auto" else f" with its cache in {shape.cache_dtype}"
    source = "by its data sheet" if device.kind == "sheet" else "measured"
    return (
        f"{shape.name} in {shape.dtype}{cache} on {device.name}: {device.memory / 1e9:.3g} GB, "
        f"{device.bandwidth / 1e12:.3g} TB/s, {device.arithmetic / 1e12:.3g} Tflop/s in {shape.dtype} ({source})"
    )


def drawing_lines(shape: Shape, device: Device, planned: Plan, guided: bool) -> Iterator[str]:
    """Show a plan of drawing with its arithmetic, and what to change if it does not fit."""
    from vce_ray.models.shape import BYTES
    from vce_ray.sampling.memory import cache_slots
    from vce_ray.sampling.plan import plan, slot_block, useful_batch

    twice = ", the former twice" if device.packs and shape.dtype == "float32" else ""
    yield "\ndrawing"
    parameters = f"{_millions(shape.step_parameters)} read per step + {_millions(shape.idle_parameters)}{twice}"
    yield f"  weights    ({parameters}) x {BYTES[shape.dtype]} B = {planned.weight_bytes / 1e9:.2f} GB"
    yield (
        f"  cache      {planned.rows} rows x {cache_slots(shape, slot_block(device))} slots x "
        f"{shape.cache_bytes / 1024:.0f} KiB = {planned.cache_bytes / 1e9:.2f} GB"
    )
    verdict = f"fits; up to {planned.largest} would" if planned.fits else "DOES NOT FIT"
    yield (
        f"  memory     {_images(planned.batch)} at once, peak {planned.peak_bytes / 1e9:.2f} of "
        f"{device.usable / 1e9:.2f} GB: {verdict}"
    )
    if not planned.fits:
        yield from (f"  instead    {change}" for change in drawing_changes(shape, device, planned, guided))
        return
    single_s, useful = plan(shape, device, 1, guided).batch_s, useful_batch(shape, device, guided)
    yield (
        f"  at best    {planned.step_s * 1e3:.2f} ms per step x {shape.image_tokens} tokens = {_time(planned.batch_s)} "
        f"per batch, {_number(planned.images_per_s)} images/s; a single image takes {_time(single_s)}"
    )
    yield (
        f"  expected   {planned.expected_step_s * 1e3:.2f} ms per step, {_time(planned.expected_batch_s)} per batch, "
        f"{_number(planned.batch / planned.expected_batch_s)} images/s: "
        f"{planned.expected_step_s / planned.step_s:.1f} times the limit"
    )
    yield f"  bound by   {planned.bound}; 90% of the highest throughput takes a batch of {useful}"


def drawing_changes(shape: Shape, device: Device, planned: Plan, guided: bool) -> Iterator[str]:
    """Yield what fits instead of a batch that does not."""
    from vce_ray.sampling.plan import needed_memory, plan

    if planned.largest:
        yield f"--batch {planned.largest}"
    if shape.kv_cache_dtype == "auto" and device.supports("fp8"):
        in_fp8 = plan(replace(shape, kv_cache_dtype="fp8"), device, planned.batch, guided)
        if in_fp8.largest > planned.largest:
            yield f"--kv-cache fp8 --batch {min(in_fp8.largest, planned.batch)}"
    able = [card for card in known_devices(shape) if plan(shape, card, planned.batch, guided).fits]
    needed = needed_memory(shape, guided, slot_block=64, batch=planned.batch)
    yield f"a GPU with {needed / 1e9:.1f} GB" + (f": {_names(able)}" if able else ", which no known one has")


def training_lines(shape: Shape, device: Device, config: RunConfig, planned: TrainingPlan) -> Iterator[str]:
    """Show a plan of training with its arithmetic, and what to change if it does not fit."""
    train = config.train
    what = f"a LoRA of rank {train.lora_rank}" if train.weights == "lora" else "all weights"
    split = "" if planned.workers == 1 else f", {'sharded' if planned.sharded else 'replicated'}"
    workers = f"{planned.workers} worker{'s' * (planned.workers > 1)}{split}"
    yield f"\ntraining {what} by {train.method}, {planned.steps} steps of {train.batch_size} pairs, {workers}"
    copy = f" + base {planned.base_bytes / 1e9:.2f}" if planned.base_bytes else ""
    yield (
        f"  memory     weights {planned.weight_bytes / 1e9:.2f} + states of {_millions(planned.trained_parameters)} "
        f"{planned.state_bytes / 1e9:.2f}{copy} + activations of {_images(planned.images)} "
        f"{planned.activation_bytes / 1e9:.2f} GB"
    )
    loading = ", when it is loaded" if planned.peak_bytes == planned.loaded_bytes else ""
    yield (
        f"             peak {planned.peak_bytes / 1e9:.2f} of {planned.usable_bytes / 1e9:.2f} GB per worker{loading}: "
        + ("fits" if planned.fits else "DOES NOT FIT")
    )
    if not planned.fits:
        yield from (f"  instead    {change}" for change in training_changes(shape, device, config))
        return
    factor = planned.expected_step_s / planned.step_s
    yield f"  at best    {_time(planned.step_s)} per step"
    yield f"  expected   {_time(planned.expected_step_s)} per step: {factor:.1f} times the limit"
    if planned.gathered_bytes:
        yield f"  not counted: each worker receives {planned.gathered_bytes / 1e9:.0f} GB of shards in a step"


def training_changes(shape: Shape, device: Device, config: RunConfig) -> Iterator[str]:
    """Yield what fits instead of a training that does not."""
    from vce_ray.training.plan import plan_training

    train = config.train
    sizes = {field: getattr(train, field) for field in train.batch_fields}

    def fits(on: Device, **changes: Any) -> bool:
        return plan_training(shape, on, train.model_copy(update=changes)).fits

    shared, now = gcd(*sizes.values()), train.num_workers or 1
    workers = (count for count in range(now + 1, shared + 1) if shared % count == 0)
    if count := next((count for count in workers if fits(device, num_workers=count, shard=None)), None):
        yield f"--workers {count}, which share batch and weights"
    for part in (2, 4, 8):
        smaller = {field: size // part for field, size in sizes.items()}
        if all(size >= now and size % now == 0 for size in smaller.values()) and fits(device, **smaller):
            flags = {"batch_size": "--train-batch-size", "keep_batch_size": "--keep-batch-size"}
            yield " ".join(f"{flags[field]} {size}" for field, size in smaller.items()) + ", which trains less per step"
            break
    if train.weights == "full" and fits(device, weights="lora"):
        yield "--weights lora"
    able = [card for card in known_devices(shape) if fits(card)]
    yield "another GPU" + (f": {_names(able)}" if able else " with more memory than any known one")


def known_devices(shape: Shape) -> list[Device]:
    """Return the known GPUs that compute in the dtypes of a model and its cache."""
    devices = [card.device(shape.dtype) for card in CARDS.values()]
    return [device for device in devices if device.supports(shape.dtype, shape.cache_dtype)]


def run_lines(planned: RunPlan, device: Device, price: float | None) -> Iterator[str]:
    """Show the stages of a run, its time, and its GPU-hours and their cost."""
    where = "this CPU" if device.kind == "cpu" else f"{planned.gpus} GPU{'s' * (planned.gpus > 1)}"
    yield f"\na run of {planned.config.concept} on {where}"
    yield f"  {'stage':<11} {'at best':>9}  {'expected':>9}"
    for stage in planned.stages:
        yield f"  {stage.name:<11} {_time(stage.least_s):>9}  {_time(stage.expected_s):>9}  {stage.work}"
    yield f"  {'total':<11} {_time(planned.least_s):>9}  {_time(planned.expected_s):>9}"
    if device.kind != "cpu":
        hours = [seconds * planned.gpus / 3600 for seconds in (planned.least_s, planned.expected_s)]
        yield f"  {'GPU-hours':<11} {hours[0]:>9.2f}  {hours[1]:>9.2f}"
        if price is not None:
            yield f"  {'cost':<11} {hours[0] * price:>9.2f}  {hours[1] * price:>9.2f}"
    yield "not counted: starting nodes and models, pixels and files, the judge, safe images that are drawn again"
    yield BASIS[device.kind]


def _names(devices: list[Device]) -> str:
    return ", ".join(device.name for device in devices)


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M"


def _number(value: float) -> str:
    """Format a number with three digits, or more if it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    """Format a duration: milliseconds, seconds, minutes or hours."""
    if seconds < 0.1:
        return f"{_number(seconds * 1e3)} ms"
    if seconds < 100:
        return f"{_number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
