"""Erases concepts: one run or many, from a concept's name to its report, each stage skipped where it is published.

    prompts -> pair sets of all runs in one flow -> a training each, once its pairs are there -> evaluation, report

Runs share the cluster and the pictures that several of them want. One that fails does so alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vce_ray.config import TrainConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError, format_error
from vce_ray.pipeline.run import FLOW, STAGES, TRAINING, Run
from vce_ray.run_config import RunConfig

if TYPE_CHECKING:
    from vce_ray.training.train import Trainings

METRICS = "evaluation/metrics.json"
PAIRED = ("unsafe", "captions", "safe", "pairs", "reference")
"""Stages that end when the pair set of a run is published."""

SHARED: dict[str, Callable[[RunConfig], Any]] = {
    "base": lambda config: config.base,
    "captioner": lambda config: config.captioner,
    "refiner": lambda config: config.refiner,
    "sampling": lambda config: config.sampling,
    "judge": lambda config: config.evaluation.judge,
    "safe_attempts": lambda config: config.pairs.safe_attempts,
    "num_workers": lambda config: config.train.num_workers,
    "cluster": lambda config: config.cluster,
}
"""What runs that are erased together have in common."""

Failures = dict[str, BaseException]


def erase(runs: Sequence[Run], pairs_only: bool = False) -> dict[str, dict[str, Any] | BaseException]:
    """Runs all stages of all runs that are not published yet.

    All have the same base, captioner and sampling. Whatever ends a run is written into its run.json first.

    Args:
        pairs_only: stop each run once its pair set is published; without it the same run goes on from there.

    Returns:
        The figures of each run's evaluation, none where it stops at its pairs, or what it failed with; by its name.

    Raises:
        UserError: the runs do not agree in what they share, or two have the same name.
        KeyboardInterrupt, and faults that no single run is to blame for.
    """
    failures: Failures = {}
    _check_shared(runs)
    open_runs = {run.name: run for run in runs}
    try:
        _erase(open_runs, failures, pairs_only)
    except KeyboardInterrupt:
        _finish_all(open_runs, "stopped", "interrupted")
        raise
    except BaseException as error:
        _finish_all(open_runs, "failed", format_error(error))
        raise
    return {
        run.name: failures.get(run.name) or (run.store.read_json(METRICS) if run.done("report") else {}) for run in runs
    }


def unfinished(run: Run) -> bool:
    """Whether a run has work left, for which it needs a cluster."""
    return not run.done("report")


def _check_shared(runs: Sequence[Run]) -> None:
    first = runs[0]
    for number, run in enumerate(runs):
        if run.name in {other.name for other in runs[:number]}:
            raise UserError(f"two runs are named {run.name}: give one of them another name")
        for field, of in SHARED.items():
            if of(run.config) != of(first.config):
                raise UserError(
                    f"runs {first.name} and {run.name} share actors and pictures, but differ in {field}: "
                    "give them the same, or erase them by commands of their own"
                )


def _erase(runs: dict[str, Run], failures: Failures, pairs_only: bool) -> None:
    for run in runs.values():
        for stage in STAGES:
            if run.done(stage):
                run.tell(stage, "published before")
    for run in [run for run in runs.values() if not unfinished(run)]:
        runs.pop(run.name).finish("done")
    if not runs:
        return
    for run in runs.values():
        if not run.done("prompts"):
            _prompts(run)

    def fail(run: Run, error: BaseException) -> None:
        failures[run.name] = error
        run.finish("failed", format_error(error))
        del runs[run.name]

    lanes = None if pairs_only else _lanes(dict(runs))
    try:
        trainings: dict[Future[None], Run] = {}

        def train_or_fail(run: Run, fault: BaseException | None) -> None:
            if fault is not None:
                fail(run, fault)
            elif lanes is not None:
                trainings[_train(run, lanes)] = run

        _pairs(dict(runs), train_or_fail)
        trained: dict[str, Run] = {}
        while trainings or trained:
            for future in wait(trainings, return_when=FIRST_COMPLETED).done:
                run = trainings.pop(future)
                if error := future.exception():
                    fail(run, error)
                else:
                    trained[run.name] = run
            if trained and lanes and len(trainings) < lanes.at_once:  # there is room for more than what still trains
                _evaluate(trained, fail)
                trained = {}
    finally:
        if lanes is not None:
            lanes.close()
    for run in runs.values():
        if run.done("report"):
            run.finish("done")
        else:
            run.finish("stopped", "as asked, with its pairs published")


def _lanes(runs: Mapping[str, Run]) -> Trainings:
    """Where these runs are trained."""
    from vce_ray.training.train import Trainings

    configs = [run.config.train for run in runs.values()]
    return Trainings(
        configs,
        min(_slots(configs[0]), len(runs)),
        began=lambda name: runs[name].begin("training"),
        ended=lambda name: _end_training(runs[name]),
    )


def _slots(config: TrainConfig) -> int:
    """How many trainings there is room for at once."""
    import ray

    cluster, workers = ray.cluster_resources(), config.num_workers or 1
    return max(1, int(cluster.get("GPU", 0) or cluster.get("CPU", 1)) // workers)


def _finish_all(runs: Mapping[str, Run], status: str, error: str) -> None:
    for run in runs.values():
        run.finish(status, error)


# The stages -----------------------------------------------------------------------------------------------------------


def _prompts(run: Run) -> None:
    from vce_ray.evaluation.prompts import evaluation_prompts
    from vce_ray.pipeline.pair_flow import publish_prompts, publish_rows

    run.begin("prompts")
    publish_prompts(run.task)
    asked = run.store.stage("evaluation/prompts")
    if not asked.published():
        publish_rows(asked, evaluation_prompts(run.config, run.concept))
    run.end("prompts", **run.rows("prompts"))


def _pairs(runs: Mapping[str, Run], settled: Callable[[Run, BaseException | None], None]) -> None:
    """Makes the pair sets that are not there yet; `settled(run, fault)` is called for each run."""
    from vce_ray.pipeline.before_after import arm_step
    from vce_ray.pipeline.pair_flow import make_pairs
    from vce_ray.pipeline.reuse import adopt_pairs

    def settle(task: Task, fault: BaseException | None) -> None:
        run = runs[task.name]
        if fault is None:
            for stage in PAIRED:
                if not run.done(stage):
                    run.end(stage, **run.rows(stage))
        settled(run, fault)

    for run in runs.values():
        run.begin(*(stage for stage in PAIRED if not run.done(stage)))
        if run.config.pairs_of:
            adopt_pairs(run.task)
    tasks = {run.name: run.task for run in runs.values()}
    make_pairs(tasks, arm_step("before", tasks), settle)


def _train(run: Run, lanes: Trainings) -> Future[None]:
    """Puts a run in line for its training, unless it is trained already; what this gives is done when it is."""
    if run.store.exists(TRAINING):
        trained: Future[None] = Future()
        trained.set_result(None)
        if not run.done("training"):
            run.begin("training")
            _end_training(run)
        return trained
    facts = {"concept": run.concept.name, "run": run.name, "method": run.config.train.method}
    return lanes.submit(run.name, run.config, run.store, facts)


def _end_training(run: Run) -> None:
    last = run.store.read_json(TRAINING)[-1]
    run.end("training", **{key: round(last[key], 4) for key in ("step", "loss", "margin")})


def _evaluate(runs: Mapping[str, Run], fail: Callable[[Run, BaseException], None]) -> None:
    from vce_ray.pipeline.before_after import evaluate_after

    todo = [run for run in runs.values() if not run.done("evaluation")]
    for run in todo:
        run.begin("evaluation")
    if todo:
        evaluate_after({run.name: run.task for run in todo})
    for run in runs.values():
        try:
            _report(run)
        except UserError as error:  # figures that cannot be had of this run's images
            fail(run, error)


def _report(run: Run) -> None:
    from vce_ray.evaluation.metrics import evaluate
    from vce_ray.evaluation.report import write_report

    if not run.done("evaluation"):
        figures = evaluate(judged(run, [name for name in schemas.EVALUATION.names if name != "image"]), run.concept)
        run.store.write_json(METRICS, figures)
        told = ("seen_before", "seen_after", "kept_drop", "score_drop")
        run.end("evaluation", **{key: round(figures[key], 4) for key in told if figures[key] is not None})
    if not run.done("report"):
        run.begin("report")
        run.store.write_bytes("report/index.html", write_report(report_data(run)).encode())
        run.end("report", page=run.store.where("report/index.html"))


def judged(run: Run, columns: Sequence[str]) -> pa.Table:
    """The judged images of both arms of a run."""
    from vce_ray.evaluation.prompts import ARMS

    return pa.concat_tables([run.store.stage(f"evaluation/{arm}").read(columns=columns) for arm in ARMS])


def report_data(run: Run):
    """All that a run's report shows, read back from its published stages."""
    from vce_ray.evaluation.report import ReportData

    rejects = [
        run.store.stage(f"rejects/{stage}").read(allow_missing=True, columns=schemas.REJECTS.names) for stage in FLOW
    ]
    return ReportData(
        run=run.record,
        concept=run.concept,
        metrics=run.store.read_json(METRICS),
        evaluation=judged(run, schemas.EVALUATION.names).to_pylist(),
        pairs=run.store.stage("pairs").read().slice(0, 24).to_pylist(),
        training=run.store.read_json(TRAINING),
        rejects=[row for table in rejects for row in table.to_pylist()],
    )
