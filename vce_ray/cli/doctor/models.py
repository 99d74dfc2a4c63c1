"""Checks the models of a run, with the functions that a run is checked with before it starts. Downloads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vce_ray.cli.doctor.check import Asked, Check
from vce_ray.cli.doctor.store import store_failure
from vce_ray.errors import UserError
from vce_ray.storage.errors import StoreError

ANSWER_S = 20.0
"""Seconds to wait for an endpoint's answer. A run waits longer, for one that is still loading its model."""
SHOWN = 100
"""Characters of an answer that are shown."""


def base(asked: Asked) -> Iterator[Check]:
    """Check that the base is complete, can be read from here, and fits on the disk."""
    from vce_ray.models.check import check_base

    yield _checked("base", lambda: (f"{asked.base}: {check_base(asked.base)}", ""))


def judge(asked: Asked) -> Iterator[Check]:
    """Check that each judge is a CLIP that open_clip can load, a detector that is installed, or an endpoint that sees.

    The concept is not known here: that the detector of nudity is missing is a warning unless it is named.
    """
    from vce_ray.config import DEFAULT_DETECTORS, EMBEDDED, EvalConfig
    from vce_ray.evaluation.detectors.vision import try_judge
    from vce_ray.evaluation.judges import check_judge_named

    evaluation = EvalConfig(judge=tuple(dict.fromkeys(asked.judge)))
    for name in dict.fromkeys((*evaluation.judge, *evaluation.clips(asked.base))):

        def result(name: str = name) -> tuple[str, str]:
            found = check_judge_named(name)
            return f"{name}: {try_judge(name, ANSWER_S) if name in evaluation.endpoints else found}", ""

        yield _checked("judge", result)
    for name in DEFAULT_DETECTORS if asked.base != EMBEDDED and not asked.judge else ():
        found = _checked("judge", lambda name=name: (f"{name}: {check_judge_named(name)}", ""))
        yield Check("judge", True, found.found, f"{found.fix}, to erase nudity" if found.fix else "")


def captioner(asked: Asked) -> Iterator[Check]:
    """Check the captioner. An endpoint is asked to describe a red square."""
    from vce_ray.pairs.captioner import check_captioner, try_captioner

    name = asked.captioner or asked.base

    def result() -> tuple[str, str]:
        found, answer = check_captioner(name, asked.base), try_captioner(name, ANSWER_S)
        if not answer:
            return found, ""
        sees = "red" in answer.lower()
        return f"{found} describes a red square as {answer[:SHOWN]!r}", (
            "" if sees else "make sure that the model reads images"
        )

    yield _checked("captioner", result)


def refiner(asked: Asked) -> Iterator[Check]:
    """Check the refiner, which is asked to rewrite a caption."""
    from vce_ray.pairs.captioner import try_refiner

    if (name := asked.refiner) is not None:
        yield _checked("refiner", lambda: (f"{name} answers {try_refiner(name, ANSWER_S)[:SHOWN]!r}", ""))


def _checked(name: str, result: Callable[[], tuple[str, str]]) -> Check:
    """Return the check with what `result` returns, found and fix, or with the error that it raises."""
    try:
        return Check(name, True, *result())
    except StoreError as error:
        return store_failure(name, error, "list")
    except UserError as error:
        return Check(name, False, " ".join(error.found.split()), error.fix or f"correct --{name}")
