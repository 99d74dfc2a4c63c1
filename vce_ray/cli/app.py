"""The command line, vce-ray.

torch and ray are imported inside the commands that need them, so `vce-ray --help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from vce_ray.cli.interrupt import exit_on_interrupt
from vce_ray.cli.options import TITLES, with_settings
from vce_ray.cli.plan import plan
from vce_ray.config import EMBEDDED, SEED_LIMIT
from vce_ray.errors import UserError

HELP = """Erase concepts from autoregressive image generators.

A run that was stopped resumes with the same command. Exit codes: 0 success, 2 a problem that you can fix (one line says
what), 1 a bug (with its traceback), 128 and the signal's number if a signal ended it (Ctrl-C: 130)."""
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
@with_settings(*TITLES, exclude=("name", "prompts_file", "prompt_column", "prompt_set", "prompt_category", "pairs_of"))
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
    from vce_ray.cli.console import own_output, quiet_session
    from vce_ray.cli.display import fleet_display
    from vce_ray.evaluation.summary import summary_table
    from vce_ray.pipeline.fleet import erase_fleet, open_fleet
    from vce_ray.storage.store import Store

    store = Store(uri)
    place = store.child(f"fleets/{name}")
    with exit_on_interrupt(), fleet_display(own_output()) as display:
        members = open_fleet(settings, display.log)
        display.watch(members)
        runs = [member.run for member in members if member.run]
        page = erase_fleet(members, store, name, lambda: quiet_session(place, runs, partial(display.log, "warning")))
    typer.echo("\n" + summary_table(store.read_json(f"fleets/{name}/fleet.json")))
    typer.echo(f"\nsummary: {page}")
    if any(member.error for member in members):
        raise typer.Exit(2)


def _erase(settings: dict[str, Any], pairs_only: bool = False) -> None:
    from vce_ray.cli.console import own_output, quiet_session
    from vce_ray.cli.display import RunDisplay
    from vce_ray.evaluation.table import before_after_table
    from vce_ray.evaluation.verdict import verdict_lines
    from vce_ray.pipeline.erase import erase as erase_all
    from vce_ray.pipeline.preflight import open_run
    from vce_ray.pipeline.stages import REPORT_FILE

    display = RunDisplay(own_output())
    with exit_on_interrupt():
        run = open_run(settings, display.line)
        display.line(f"erasing {run.concept.name} ({run.concept.kind}) from {run.config.base}; run {run.name}")
        with display.watching(run):
            metrics = erase_all([run], pairs_only, lambda: quiet_session(run.store, [run], display.warn))[run.name]
    if isinstance(metrics, BaseException):
        raise metrics
    if not metrics:
        typer.echo(f"\npairs: {run.store.where('pairs')}")
        return
    typer.echo("\n" + before_after_table(metrics) + "\n\n" + "\n".join(verdict_lines(metrics)))
    typer.echo(f"\nadapter: {run.store.child('adapter').uri}\nreport: {run.store.where(REPORT_FILE)}")


@app.command()
@with_settings("sampling")
def generate(
    settings: dict[str, Any],
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="Images of each prompt.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("pictures"),
    base: BaseOption = EMBEDDED,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder or URI, e.g. runs/demo-deer/adapter.")] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the first image; each further image uses the next seed."),
    ] = 0,
) -> None:
    """Draw images with a base model, with or without an adapter. Files are numbered on; none is replaced."""
    from vce_ray import api
    from vce_ray.cli.image_files import save_new
    from vce_ray.pipeline.preflight import validated_sampling
    from vce_ray.storage.local_folder import writable_folder
    from vce_ray.worker_warnings import mark_warnings

    sampling = validated_sampling(base, settings.get("sampling", {}))  # before a model is loaded
    writable_folder(out, "--out")
    mark_warnings()
    model = api.load_model(base, adapter)
    asked = [prompt for prompt in prompts for _ in range(count)]
    images = api.draw(model, asked, seed, **settings.get("sampling", {}))
    for number, (prompt, image) in enumerate(zip(asked, images, strict=True), start=seed):
        facts = {"prompt": prompt, "seed": number, "base": base, "adapter": adapter or "none"}
        path = save_new(image, out, facts | {"sampling": sampling.model_dump_json()})
        typer.echo(f"{path}  seed {number}  {prompt}")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A Janus in DeepSeek's format (folder, s3://..., owner/name), or LlamaGen's GPT (a file)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, which `--base` then takes.")],
    vq: Annotated[Path | None, typer.Option(help="LlamaGen's image tokenizer: vq_ds16_t2i.pt.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of LlamaGen's images; taken from the name of the GPT's file by default.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="LlamaGen's T5: a folder or hub id. Default: google/flan-t5-xl.")
    ] = None,
) -> None:
    """Convert released weights into a base model: a Janus in DeepSeek's own format, or LlamaGen (with --vq)."""
    from vce_ray.models import multi_modality
    from vce_ray.models.llamagen import convert as llamagen
    from vce_ray.storage.local_folder import writable_folder

    is_llamagen = Path(source).is_file()
    if is_llamagen and vq is None:
        raise UserError(f"{source} is a file: for LlamaGen's GPT give --vq too, for a Janus give its folder")
    if not is_llamagen and (vq or image_size or text_encoder):
        raise UserError(f"--vq, --image-size and --text-encoder are for LlamaGen, and {source} is not a file")
    writable_folder(out, "--out")
    if vq is None:
        multi_modality.convert(source, out)
    else:
        llamagen.convert(Path(source), vq, out, image_size, text_encoder or llamagen.FLAN_T5)
    typer.echo(f"base model: {out}")


app.command()(plan)


@app.command()
def doctor(
    store: StoreOption = "runs",
    base: BaseOption = EMBEDDED,
    judge: Annotated[
        list[str] | None, typer.Option(help="Judge, as for `erase`; may be repeated. An endpoint is asked.")
    ] = None,
    captioner: Annotated[str | None, typer.Option(help="Captioner, as for `erase`; an endpoint is asked.")] = None,
    refiner: Annotated[str | None, typer.Option(help="Refiner, as for `erase`; it is asked.")] = None,
) -> None:
    """Check that this machine, the store and the models are ready for a run, and say how to fix what is not.

    Takes the same settings as a run. Downloads no weights."""
    from vce_ray.cli.doctor import Asked, run_checks

    ready = True
    for check in run_checks(Asked(store, base, tuple(judge or ()), captioner, refiner)):
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
    every: Annotated[
        bool,
        typer.Option("--all", help="Also rows that the same models would reject again; worth it after an update."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Put a run back to where rows were rejected. Its erase command then tries them again, and trains on all pairs.
    Adapter, report and metrics are kept in the run's folder previous/."""
    from vce_ray.pipeline import retry
    from vce_ray.storage.store import Store

    store = Store(run)
    plan = retry.plan_retry(store, every)
    for rows, what in ((plan.retried, "to try again"), (plan.final, "would be rejected again")):
        for (stage, reason), count in sorted(rows.items()):
            typer.echo(f"{what}: {stage}, {count} x {reason}")
    if not plan.retried:
        typer.echo("nothing to try again" if plan.final else "nothing was rejected")
        return
    typer.echo(f"to be made again: {', '.join(plan.redone)}; finished rows are kept, the training starts anew")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was changed: give --yes to go on")
        if not typer.confirm("Go on?"):
            return
    kept = retry.retry_rejects(store, plan)
    typer.echo((f"the results so far are kept in {kept}; " if kept else "") + "run the erase command again to retry")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 2: a problem that the user can fix, printed in one line. 1: a bug, with its traceback. 128 and the
    number of a signal: interrupted by it.
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
