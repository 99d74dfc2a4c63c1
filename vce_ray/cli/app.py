"""The command line: vce-ray demo | erase | fleet | generate | plan | serve | status | retry-rejects | doctor.

torch and ray are imported inside the commands that need them, so `vce-ray --help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from vce_ray.cli import options
from vce_ray.config import EvalConfig, default_sampling
from vce_ray.errors import UserError
from vce_ray.run_config import RunConfig

if TYPE_CHECKING:
    from vce_ray.pipeline.run import Run

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def demo(store: options.Store = "runs", concept: str = "deer") -> None:
    """Erases a concept from the embedded model, from prompts to report, on this machine."""
    from vce_ray.defaults import default_settings

    judged = EvalConfig(num_keep=500)  # shorter than `erase`, and still 50 images of each neighbour
    own = {"store": store, "name": f"demo-{Path(concept).stem}", "evaluation": judged}
    _erase(RunConfig.model_validate(default_settings(concept, "emoji-world") | own))


@app.command()
@options.takes_run_options
def erase(
    settings: dict[str, Any],
    concept: Annotated[str, typer.Argument(help="A concept of the catalogue, or your own YAML file.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; concept, method and seed by default.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Your own prompts for the concept, one per line.")] = None,
    pairs_of: Annotated[
        list[str] | None, typer.Option(help="Train on the pairs of this run of the store; may be given again.")
    ] = None,
    pairs_only: options.PairsOnly = False,
) -> None:
    """Erases one concept. The same command goes on where a killed one stopped."""
    from vce_ray.defaults import default_settings, merged

    own = {"name": name, "prompts_file": prompts, "pairs_of": tuple(pairs_of or ())}
    defaults = default_settings(concept, settings["base"], settings["train"]["method"])
    _erase(RunConfig.model_validate(merged(defaults, settings | own)), pairs_only)


@app.command()
@options.takes_run_options
def fleet(
    settings: dict[str, Any],
    concepts: Annotated[list[str], typer.Argument(help="Concepts, by name or file, or a fleet file that lists them.")],
    name: Annotated[str | None, typer.Option(help="Name of the fleet; that of its file by default.")] = None,
) -> None:
    """Erases many concepts, each in a run of its own; work they share is done once. What a fleet file says goes over
    these options. The same command goes on where a killed one stopped, and tries again what failed."""
    from vce_ray.pipeline.fleet import read_fleet

    files = [Path(concept).stem for concept in concepts if concept.endswith((".yaml", ".yml"))]
    name = name or (files[0] if len(concepts) == len(files) == 1 else "fleet")
    _fleet(read_fleet(concepts, settings), name, settings["store"])


def _fleet(settings: list[dict[str, Any]], name: str, store: str) -> None:
    from vce_ray.cli.display import fleet_display
    from vce_ray.evaluation.summary import summary_table
    from vce_ray.pipeline.fleet import erase_fleet, open_fleet
    from vce_ray.storage.store import Store

    place = Store(store)
    with fleet_display() as display:
        members = open_fleet(settings, display.say)
        display.watch(members)
        with _session([member.run for member in members if member.run]), _told_of_interrupts():
            page = erase_fleet(members, place, name)
    typer.echo("\n" + summary_table(place.read_json(f"fleets/{name}/fleet.json")))
    typer.echo(f"\nsummary: {page}")
    if any(member.fault for member in members):
        raise typer.Exit(2)


def _session(runs: Sequence[Run]) -> AbstractContextManager[None]:
    """A Ray session where one of the runs has work left."""
    from vce_ray.pipeline.erase import unfinished
    from vce_ray.pipeline.session import ray_session

    return ray_session() if any(map(unfinished, runs)) else nullcontext()


@contextmanager
def _told_of_interrupts() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("vce-ray: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from error


def _erase(config: RunConfig, pairs_only: bool = False) -> None:
    from vce_ray.pipeline.erase import erase as erase_all
    from vce_ray.pipeline.run import Run

    run = Run(config, say=lambda line: typer.echo(line))
    typer.echo(f"erasing {run.concept.name} ({run.concept.kind}) from {config.base}; run {run.name}")
    with _session([run]), _told_of_interrupts():
        figures = erase_all([run], pairs_only)[run.name]
    if isinstance(figures, BaseException):
        raise figures
    if not figures:
        typer.echo(f"\npairs: {run.store.where('pairs')}")
        return
    from vce_ray.evaluation.table import before_after_table

    typer.echo("\n" + before_after_table(figures))
    typer.echo(f"\nreport: {run.store.where('report/index.html')}")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; one picture each.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("pictures"),
    base: options.Base = "emoji-world",
    adapter: Annotated[str | None, typer.Option(help="Adapter folder, e.g. runs/demo-deer/adapter.")] = None,
    seed: options.Seed = 0,
) -> None:
    """Draws pictures, with or without an adapter."""
    from PIL import Image

    from vce_ray.models.load import load_model
    from vce_ray.sampling import draw

    model = load_model(base, adapter=Path(adapter) if adapter else None)
    tokens = draw(model, prompts, list(range(seed, seed + len(prompts))), default_sampling(base))
    out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, image) in enumerate(zip(prompts, model.decode_pixels(tokens), strict=True)):
        path = out / f"{number:03d}.png"
        Image.fromarray(image).save(path)
        typer.echo(f"{path}  {prompt}")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A shape by name, such as janus-pro-7b, or a base model.")] = "emoji-world",
    device: Annotated[str, typer.Option(help="h200, h100, a100-80gb, ..., or 'this': measured here.")] = "this",
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at once; the best that fits by default.")] = None,
    guidance: Annotated[bool, typer.Option(help="Whether unconditional rows are drawn beside.")] = True,
    kv_cache: options.KvCache = "auto",
) -> None:
    """Tells batch, memory and time of drawing on a device, had or not, with the arithmetic."""
    from vce_ray.sampling.plan import DEVICES, SHAPES, explain
    from vce_ray.sampling.plan import plan as make_plan

    if device != "this" and device not in DEVICES:
        raise UserError(f"unknown device {device!r}: known are this, {', '.join(DEVICES)}")
    shape = SHAPES.get(model)
    if shape is None:
        from vce_ray.models.load import load_model

        shape = load_model(model, device="cpu").shape
    shape = replace(shape, kv_cache_dtype=kv_cache)
    if device == "this":
        import torch

        from vce_ray.sampling.device import measure_device

        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        limits = measure_device(where, getattr(torch, shape.dtype))
    else:
        limits = DEVICES[device]
    typer.echo(explain(shape, limits, make_plan(shape, limits, batch, guidance), guidance))


@app.command()
def doctor(store: options.Store = "runs", base: options.Base = "emoji-world") -> None:
    """Says whether this machine and the store are fit for a run, and how to mend what is not."""
    from vce_ray.cli.doctor import examine

    fit = True
    for check in examine(store, base):
        typer.echo(check.line)
        fit = fit and check.ok
    if not fit:
        raise typer.Exit(2)


@app.command()
def serve(
    adapter: Annotated[str | None, typer.Option(help="Adapter folder or store path; none serves the base.")] = None,
    base: options.Base = "emoji-world",
    host: Annotated[str, typer.Option(help="Anything but loopback wants VCE_RAY_API_TOKEN set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    kv_cache: options.KvCache = "auto",
) -> None:
    """Serves POST /v1/images/generations (OpenAI's shape) on Ray Serve until interrupted."""
    from vce_ray.pipeline.session import ray_session
    from vce_ray.serving.deploy import serve_command

    with ray_session():
        serve_command(base, adapter, host, port, default_sampling(base, kv_cache_dtype=kv_cache), block=True)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="A run's folder or prefix in a bucket, or a store of runs.")],
) -> None:
    """Tells how far a run is, or each run of a store; also while it runs."""
    from vce_ray.pipeline.status import status_lines
    from vce_ray.storage.store import Store

    for line in status_lines(Store(run)):
        typer.echo(line)


@app.command()
def retry_rejects(run: Annotated[str, typer.Argument(help="The run's folder or prefix in a bucket.")]) -> None:
    """Takes back what a run rejected: the same command then tries those rows again, and trains anew."""
    from vce_ray.pipeline.status import retry_rejects as take_back
    from vce_ray.storage.store import Store

    taken = take_back(Store(run))
    for (stage, reason), count in sorted(taken.items()):
        typer.echo(f"{stage}: {count} x {reason}")
    typer.echo("give the run's command again to try them" if taken else "nothing was rejected")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 a fault (with its traceback), 2 something the user can mend
    (one line that says what), 130 interrupted."""
    from vce_ray.storage.errors import StoreError

    try:
        app(args=arguments)
    except SystemExit as end:  # the parser's own: help, a wrong option, typer.Exit
        return end.code if isinstance(end.code, int) else 0
    except ValidationError as error:
        wrong = "; ".join(".".join(map(str, (*e["loc"], ""))) + " " * bool(e["loc"]) + e["msg"] for e in error.errors())
        typer.echo(f"vce-ray: {wrong}", err=True)
        return 2
    except (UserError, StoreError) as error:
        typer.echo(f"vce-ray: {error}", err=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
