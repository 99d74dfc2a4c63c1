"""Checks everything that a run needs before anything is written or any model loads, cheap checks first:

    settings -> concept, prompts -> training settings -> store -> judges, base, captioner (configs and lists of files)
    -> endpoints of captioner, refiner and judges, which are asked one question

`vce-ray doctor` calls the same functions. The cluster comes last and is checked when the first actors are placed
(dataflow/fanout.py). Whatever has to be looked up for the settings, such as how a base is best sampled, is looked up
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.language import pipeline_folder
from vce_ray.concepts.load import load_concept
from vce_ray.config import DETECTORS, Config, SamplingConfig, TrainConfig, describe
from vce_ray.dataflow.task import Task
from vce_ray.defaults import Settings, default_settings, merged
from vce_ray.env import CAPTIONER_DEADLINE_S
from vce_ray.errors import UserError
from vce_ray.evaluation.detectors.vision import try_judge
from vce_ray.evaluation.judges import check_judge_of, check_judges, unused_judges
from vce_ray.models.check import check_base
from vce_ray.models.families import default_sampling
from vce_ray.models.folder import source_of
from vce_ray.models.words import vocabulary_of
from vce_ray.pairs.captioner import check_captioner, open_refiner, parse_captioner, try_captioner, try_refiner
from vce_ray.pairs.prompt_file import read_own_prompts
from vce_ray.pipeline.run import RUN_FILE, Run
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.trackers import check_trackers
from vce_ray.training.objectives import DEFAULT_METHOD, objective_type


def open_run(settings: Mapping[str, Any], log: Callable[[str], None] = print) -> Run:
    """Check everything that a run needs and open it. Nothing is written until the run starts.

    Args:
        settings: keys of RunConfig, with sections as dicts; what is left out gets its default (defaults.py).
        log: takes the run's progress, line by line.

    Raises:
        UserError: a setting, the concept, the judge, the base or the captioner is unusable, or the store has a run of
            this name with other settings, or one that began with another judge.
        StoreError: the store cannot be reached.
    """
    run = check_run(settings, log)
    ask_endpoints([run])
    return run


def check_run(settings: Mapping[str, Any], log: Callable[[str], None] = print) -> Run:
    """Open a run as `open_run` does, but ask its endpoints nothing: the runs of a fleet share them."""
    run = Run(prepare(settings), log)
    for name in unused_judges(run.config, run.concept):
        log(f"{name} recognizes {DETECTORS[name]}: it does not judge {run.concept.name}")
    if not run.done("evaluation"):
        check_judge_of(run.task)
    return run


def ask_endpoints(runs: Sequence[Run]) -> None:
    """Ask each captioner, refiner and judge that the runs have work for one question, if it is an endpoint.

    Raises:
        CaptionerError: one gives no usable answer.
    """
    configs = [run.config for run in runs if not run.done("pairs") and not run.config.pairs_of]
    say = next((run.log for run in runs), print)
    for captioner in {config.captioning_model for config in configs}:
        if parse_captioner(captioner).kind == "endpoint":
            say(f"asking the captioner {captioner} one question, for up to {CAPTIONER_DEADLINE_S.get():.0f} s")
        try_captioner(captioner)
    for refiner in {config.refiner for config in configs if config.refiner is not None}:
        say(f"asking the refiner {refiner} one question, for up to {CAPTIONER_DEADLINE_S.get():.0f} s")
        try_refiner(refiner)
    judged = [run.config.evaluation for run in runs if not run.done("evaluation")]
    for judge in dict.fromkeys(name for evaluation in judged for name in evaluation.endpoints):
        say(f"asking the judge {judge} one question, for up to {CAPTIONER_DEADLINE_S.get():.0f} s")
        try_judge(judge)


def prepare(given: Mapping[str, Any]) -> Task:
    """Check the settings and the models of a run and complete the settings. Raises as `open_run` does."""
    settings: Settings = {"sampling": {}, "train": {}} | _plain(given)
    asked = _validated(settings | {"train": {}})
    check_trackers(asked.track)
    base = asked.base
    source_of(base)
    concept = load_concept(asked.concept, base)
    if asked.pairs_of and (asked.prompts_file or "pairs" in given):
        unused = "--prompts" if asked.prompts_file else "pairs." + ", pairs.".join(settings["pairs"])
        raise UserError(f"{unused} has no use with --pairs-of, whose runs have made the pairs: leave one of them out")
    own = read_own_prompts(asked)
    if own is not None and (vocabulary := vocabulary_of(base)):
        vocabulary.check(own.prompts, str(asked.prompts_file))
    # training settings are checked with the concept's own: both may be wrong alone and right together
    method = _method(settings["train"], concept)
    defaults = default_settings(concept, base, method)
    wanted = _validated(merged(defaults, settings))
    if wanted.train.preserves and not (wanted.pairs.num_keep or wanted.pairs_of):
        raise UserError(
            "--keep 0 leaves no images to preserve the rest of the model with: give at least one, or --keep-weight 0 "
            "with --allow-no-preservation"
        )
    name = asked.name or f"{concept.name}-{method.replace('_', '-')}-{asked.seed}"
    if "/" in name:
        raise UserError(f"--name {name!r} must be the name of one folder in the store: remove the slash")
    if Path(asked.store).is_file():
        raise UserError(f"--store {asked.store} is a file: give a folder, s3://bucket/prefix or gs://bucket/prefix")
    place = Store(asked.store)
    store = place.child(name)
    store.exists(RUN_FILE)  # fails here, with a message, if the store cannot be reached
    for source in asked.pairs_of:
        if not place.child(source).stage("pairs").published():
            raise UserError(
                f"--pairs-of {source}: {asked.store} has no run of this name with pairs; see vce-ray status"
            )
    check_judges(asked, concept)
    check_base(base)
    sampling = default_sampling(base)
    check_captioner(asked.captioning_model, base)
    pipeline_folder()  # fails here, with a message, if captions cannot be parsed
    if asked.refiner is not None:
        open_refiner(asked.refiner)
    config = _validated(merged(defaults | {"sampling": sampling.model_dump()}, settings))
    return Task(name, config, concept, store)


def _method(train: Any, concept: Concept) -> str:
    """Return the training method: the user's, else that of the concept's file, else the default."""
    chosen = train.get("method") if isinstance(train, dict) else None
    return objective_type(chosen or concept.train.get("method", DEFAULT_METHOD)).name


def validated_sampling(base: str, settings: Mapping[str, Any]) -> SamplingConfig:
    """Return a base's sampling settings, overridden by `settings`. Raises UserError if one of them is wrong."""
    try:
        return default_sampling(base, **settings)
    except ValidationError as error:
        raise UserError(describe(error)) from error


def _plain(settings: Mapping[str, Any]) -> Settings:
    """Turn sections given as models into dicts of what was set in them, so that defaults fill in the rest."""
    plain = {
        key: value.model_dump(exclude_unset=True) if isinstance(value, Config) else value
        for key, value in settings.items()
    }
    if isinstance(train := settings.get("train"), TrainConfig):
        plain["train"] |= {"method": train.method}
    return plain


def _validated(settings: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(describe(error)) from error
