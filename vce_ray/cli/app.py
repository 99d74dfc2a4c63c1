"""The command line, vce-ray.

torch and ray are imported inside the commands that need them, so `vce-ray --help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vce_ray.cli.options import TITLES, with_settings
from vce_ray.config import EMBEDDED, SEED_LIMIT
from vce_ray.errors import UserError, file_problems

HELP = """Erase concepts from autoregressive image generators.

A run that was stopped resumes with the same command. Exit codes: 0 success, 2 a problem that you can fix (one line says
what), 1 a bug (with its traceback), 130 interrupted."""
DEMO_KEPT = 500
"""Kept images that the demo judges: fewer than `erase`, and still 50 of each neighbour."""

StoreOption = Annotated[str, typer.Option(help="Where runs are stored: a local folder, s3://bucket/prefix or gs://...")]
BaseOption = Annotated[str, typer.Option(help="Base model: emoji-world, a folder, s3://..., gs://... or owner/name.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vce-ray {version('vce_ray')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of vce-ray itself."""


@app.command()
def demo(store: StoreOption = "runs", concept: str = "deer") -> None:
    """Erase a concept from the embedded model, from prompts to report, on this machine."""
    _erase({"concept": concept, "store": store, "name": f"demo-{Path(concept).stem}"}
           | {"evaluation": {"num_keep": DEMO_KEPT}})  # fmt: skip


@app.command()
@with_settings(*TITLES)
def erase(
    settings: dict[str, Any],
    concept: Annotated[str, typer.Argument(help="A concept of the catalogue, or a YAML file of your own.")],
    pairs_only: Annotated[
        bool,
        typer.Option(
            "--pairs-only", help="Stop when the pair set is published. Without this flag, the same command goes on."
        ),
    ] = False,
) -> None:
    """Erase one concept. A run that was stopped resumes with the same command."""
    _erase({"concept": concept} | settings, pairs_only)


@app.command()
@with_settings(*TITLES, exclude=("name", "prompts_file", "prompt_column", "pairs_of"))
def fleet(
    settings: dict[str, Any],
    concepts: Annotated[list[str], typer.Argument(help="Concepts by name or file, or a fleet file that lists them.")],
    name: Annotated[str | None, typer.Option(help="Name of the fleet. Default: that of its file.")] = None,
) -> None:
    """Erase several concepts, each in its own run, sharing work between them. Settings in a fleet file override flags.
    The same command resumes stopped runs and retries failed ones."""
    from vce_ray.pipeline.fleet import read_fleet
    from vce_ray.run_config import RunConfig

    files = [Path(concept).stem for concept in concepts if concept.endswith((".yaml", ".yml"))]
    name = name or (files[0] if len(concepts) == len(files) == 1 else "fleet")
    _fleet(read_fleet(concepts, settings), name, settings.get("store", RunConfig.model_fields["store"].default))


def _fleet(settings: list[dict[str, Any]], name: str, uri: str) -> None:
    from vce_ray.api import session
    from vce_ray.cli.display import fleet_display
    from vce_ray.evaluation.summary import summary_table
    from vce_ray.pipeline.fleet import erase_fleet, open_fleet
    from vce_ray.storage.store import Store

    store = Store(uri)
    with fleet_display() as display:
        members = open_fleet(settings, display.log)
        display.watch(members)
        with session([member.run for member in members if member.run]), _exit_on_interrupt():
            page = erase_fleet(members, store, name)
    typer.echo("\n" + summary_table(store.read_json(f"fleets/{name}/fleet.json")))
    typer.echo(f"\nsummary: {page}")
    if any(member.error for member in members):
        raise typer.Exit(2)


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("vce-ray: interrupted; the same command resumes from here", err=True)
        raise typer.Exit(130) from error


def _erase(settings: dict[str, Any], pairs_only: bool = False) -> None:
    from vce_ray import api
    from vce_ray.evaluation.table import before_after_table
    from vce_ray.evaluation.verdict import verdict_lines

    with _exit_on_interrupt():
        erasure = api.erase(**settings, pairs_only=pairs_only, log=lambda line: typer.echo(line))
    if not erasure.metrics:
        typer.echo(f"\npairs: {erasure.store.where('pairs')}")
        return
    typer.echo("\n" + before_after_table(erasure.metrics) + "\n\n" + "\n".join(verdict_lines(erasure.metrics)))
    typer.echo(f"\nadapter: {erasure.adapter}\nreport: {erasure.report}")


@app.command()
@with_settings("sampling")
def generate(
    settings: dict[str, Any],
    prompts: Annotated[list[str], typer.Argument(help="What to draw, one image each.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("pictures"),
    base: BaseOption = EMBEDDED,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder or URI, e.g. runs/demo-deer/adapter.")] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the first image; each further image uses the next seed."),
    ] = 0,
) -> None:
    """Draw images with a base model, with or without an adapter."""
    from vce_ray import api
    from vce_ray.pipeline.preflight import validated_sampling
    from vce_ray.storage.local_folder import writable_folder

    validated_sampling(base, settings.get("sampling", {}))  # before a model is loaded, as is the next line
    writable_folder(out, "--out")
    model = api.load_model(base, adapter)
    images = api.draw(model, prompts, seed, **settings.get("sampling", {}))
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = out / f"{number:03d}.png"
        with file_problems("set --out to another folder", path):
            image.save(path)
        typer.echo(f"{path}  {prompt}")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A shape by name, such as janus-pro-7b, or a base model.")] = EMBEDDED,
    device: Annotated[str, typer.Option(help="h200, h100, a100-80gb, ..., or 'this', which is measured.")] = "this",
    batch: Annotated[int | None, typer.Option(min=1, help="Images at once. Default: the best that fits.")] = None,
    guidance: Annotated[bool, typer.Option(help="Use guidance, which doubles the rows.")] = True,
    kv_cache: Annotated[
        Literal["auto", "fp8"], typer.Option("--kv-cache", help="Precision of cached keys and values.")
    ] = "auto",
) -> None:
    """Estimate batch size, memory and best-case speed on a device, present or not, and show the arithmetic."""
    from vce_ray.sampling.plan import DEVICES, SHAPES, explain, measure_device
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

        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        limits = measure_device(here, getattr(torch, shape.dtype))
    else:
        limits = DEVICES[device]
    typer.echo(explain(shape, limits, make_plan(shape, limits, batch, guidance), guidance))


@app.command()
def doctor(store: StoreOption = "runs", base: BaseOption = EMBEDDED) -> None:
    """Check that this machine and the store are ready for a run, and say how to fix what is not."""
    from vce_ray.cli.doctor import run_checks

    ready = True
    for check in run_checks(store, base):
        typer.echo(check.line)
        ready = ready and check.ok
    if not ready:
        raise typer.Exit(2)


@app.command()
@with_settings("sampling")
def serve(
    settings: dict[str, Any],
    adapter: Annotated[str | None, typer.Option(help="Adapter folder or store path. Default: the base alone.")] = None,
    base: BaseOption = EMBEDDED,
    host: Annotated[
        str, typer.Option(help="Address to listen on; if not loopback, set VCE_RAY_API_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve POST /v1/images/generations, in the format of OpenAI's API, on Ray Serve until interrupted."""
    from vce_ray.pipeline.preflight import validated_sampling
    from vce_ray.pipeline.session import ray_session
    from vce_ray.serving.deploy import serve_command

    sampling = validated_sampling(base, settings.get("sampling", {}))
    with ray_session():
        serve_command(base, adapter, host, port, sampling)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="A run's folder or bucket prefix, or a store of runs.")],
) -> None:
    """Show the progress of a run, or of every run in a store. Works while they are active."""
    from vce_ray import api

    for line in api.status(run):
        typer.echo(line)


@app.command()
def evaluate(run: Annotated[str, typer.Argument(help="The run's folder or bucket prefix.")]) -> None:
    """Compute the metrics of a run again from its evaluation images, and show them. Nothing is written."""
    from vce_ray import api
    from vce_ray.evaluation.table import before_after_table
    from vce_ray.evaluation.verdict import verdict_lines

    metrics = api.evaluate(run)
    typer.echo(before_after_table(metrics) + "\n\n" + "\n".join(verdict_lines(metrics)))


@app.command()
def concepts(
    name: Annotated[str | None, typer.Argument(help="A concept, by name or file, to print as YAML.")] = None,
    base: BaseOption = EMBEDDED,
) -> None:
    """List the concepts that ship for a base model, or print one, complete, as a start for a file of your own."""
    import yaml

    from vce_ray.concepts.load import catalogue, load_concept

    if name is not None:
        fields = load_concept(name, base).model_dump(mode="json", exclude_defaults=True)
        typer.echo(yaml.safe_dump(fields, sort_keys=False, width=120), nl=False)
        return
    for known in catalogue(base):
        concept = load_concept(known, base)
        typer.echo(f"{known:<12} {concept.kind:<8} {', '.join(concept.names)}")


@app.command()
def retry_rejects(
    run: Annotated[str, typer.Argument(help="The run's folder or bucket prefix.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Clear the rejects of a run and the results without those rows. Its erase command then retries them."""
    from vce_ray.pipeline.status import count_rejects
    from vce_ray.pipeline.status import retry_rejects as clear_rejects
    from vce_ray.storage.store import Store

    store = Store(run)
    rejects, redone = count_rejects(store)
    for (stage, reason), count in sorted(rejects.items()):
        typer.echo(f"{stage}: {count} x {reason}")
    if not rejects:
        typer.echo("nothing was rejected")
        return
    typer.echo(f"to be made again: {', '.join(redone)}; finished rows are kept, training and evaluation are not")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was deleted: give --yes to delete these results")
        if not typer.confirm("Delete these results?"):
            return
    clear_rejects(store)
    typer.echo("run the erase command again to retry them")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 2: a problem that the user can fix, printed in one line. 1: a bug, with its traceback. 130: interrupted.
    """
    from vce_ray.storage.errors import StoreError

    try:
        app(args=arguments)
    except SystemExit as end:  # raised by the parser: help, a wrong option, typer.Exit
        return end.code if isinstance(end.code, int) else 0
    except (UserError, StoreError) as error:
        typer.echo(f"vce-ray: {error}", err=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
