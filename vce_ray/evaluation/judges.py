"""Who judges a run: CLIPs, detectors and vision models, as its settings name them (`EvalConfig.judge`).

A judge that changed in the course of a run would judge the images before and after by two standards. So a run records
the revisions of its judges together with the prompts of its evaluation, and refuses any others (`check_judge_of`).
"""

from __future__ import annotations

import difflib
import platform

from vce_ray.concepts.concept import Concept
from vce_ray.config import DETECTORS
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError, quote
from vce_ray.evaluation.detectors import DETECTORS as ALL
from vce_ray.evaluation.detectors import detectors_for
from vce_ray.evaluation.detectors.vision import open_judge, question_about
from vce_ray.evaluation.judge import check_judge, judge_revision
from vce_ray.run_config import RunConfig

STAMP = "judge_revision"
"""Fact of an evaluation: the revision of its first judge, the CLIP that names what images show."""


def check_judges(config: RunConfig, concept: Concept) -> None:
    """Check that all judges of a run can be used, without loading a model or asking an endpoint.

    Raises:
        UserError: one is unknown, incomplete, or needs a package that is not installed.
        StoreError: the object store cannot be reached.
    """
    evaluation = config.evaluation
    for name in dict.fromkeys(
        (*evaluation.judge, *evaluation.detectors(concept.content), *evaluation.clips(config.base))
    ):
        check_judge_named(name)


def check_judge_named(name: str) -> str:
    """Check one judge as `check_judges` does, and return in a few words where or what it is. Raises like it."""
    if name in DETECTORS:
        return next(detector for detector in ALL if detector.name == name).revision()
    if name.startswith(("http://", "https://")):
        return open_judge(name).url
    try:
        return check_judge(name)
    except UserError as error:
        if "/" not in name and (close := difflib.get_close_matches(name.lower(), DETECTORS)):
            raise UserError(f"unknown judge {quote(name)}", f"did you mean {close[0]}?") from error
        raise


def unused_judges(config: RunConfig, concept: Concept) -> list[str]:
    """Return the detectors that a run names although they recognize other content than its concept."""
    used = config.evaluation.detectors(concept.content)
    return [name for name in config.evaluation.judge if name in DETECTORS and name not in used]


def judge_stamp(config: RunConfig, concept: Concept) -> dict[str, str]:
    """Return the facts that a run records of its judges: their revisions and, of detectors and endpoints, their rules.

    Raises:
        UserError: a judge is unknown, or not installed.
        StoreError: the object store cannot be reached.
    """
    first, *others = config.evaluation.clips(config.base)
    stamp = {STAMP: judge_revision(first)}
    stamp |= {f"{STAMP}_{number}": judge_revision(name) for number, name in enumerate(others, start=2)}
    for detector in detectors_for(config, concept):
        if detector.name in DETECTORS:
            stamp[f"{STAMP}_{detector.name}"] = detector.revision()
    return stamp | {f"{STAMP}_{name}": question_about(concept) for name in config.evaluation.endpoints}


def check_judge_of(task: Task) -> None:
    """Check that the judges on this machine are those that a run began with.

    A run that has not begun has none to compare them with, nor has one that version 0.1 began.

    Raises:
        UserError: one is another; the message names both.
        StoreError: the store cannot be reached.
    """
    manifest = task.store.stage("evaluation/prompts").manifest()
    began_with = manifest["facts"] if manifest else {}
    if STAMP not in began_with:
        return
    now = judge_stamp(task.config, task.concept)
    for fact in [fact for fact in {**began_with, **now} if fact.startswith(STAMP)]:
        if began_with.get(fact) != now.get(fact):
            first = task.config.evaluation.clips(task.config.base)[0]
            raise UserError(
                f"run {task.name} began with judge revision {began_with.get(fact)}, "
                f"{fact.removeprefix(STAMP).strip('_') or first} on {platform.node()} is {now.get(fact)}",
                "give the judges that the run began with (pin one on the hub with @revision), or another --name",
            )
