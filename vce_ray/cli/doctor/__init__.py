"""Checks whether this machine, the store, the models and the cluster are ready for a run, and says how to fix the rest.

    for check in run_checks(Asked(store="s3://bucket/runs", base="deepseek-community/Janus-Pro-7B")):
        print(check.line)

Each check does exactly what a run does: it writes to and reads from the store, imports torchvision, asks the hub and
the captioner, joins the cluster. A new one is a function in a module of this package, from what a run uses to results
(check.py), and one line in `CHECKS`. Weights are not downloaded, and no output contains a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from vce_ray.cli.doctor import cluster, machine, models, store
from vce_ray.cli.doctor.check import Asked, Check

__all__ = ["CHECKS", "Asked", "Check", "run_checks"]

CHECKS: tuple[tuple[Callable[[Asked], Iterable[Check]], str], ...] = (
    (store.check, ""),
    (machine.versions, ""),
    (machine.torch, ""),
    (machine.gpu, "torch"),
    (machine.compiler, "torch"),
    (machine.shared_memory, ""),
    (models.base, ""),
    (machine.memory, "base"),
    (models.judge, ""),
    (models.captioner, "base"),
    (models.refiner, ""),
    (cluster.check, ""),
)
"""All checks, in order, each with the name of the result without which it would fail in the same way."""


def run_checks(asked: Asked) -> Iterator[Check]:
    """Run all checks in turn, except those that must fail because an earlier one did."""
    failed = set()
    for check, needs in CHECKS:
        if needs not in failed:
            for result in check(asked):
                if not result.ok:
                    failed.add(result.name)
                yield result
