"""Erases concepts: one run or many, from a concept's name to its report. Published stages are skipped.

    prompts -> pair sets of all runs in one flow -> one training each, once its pairs are ready -> evaluation, report

Runs share the cluster, and the images that several of them need. A run that fails does so alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from vce_ray.config import TrainConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError, format_error
from vce_ray.pipeline.run import Run
from vce_ray.pipeline.session import session
from vce_ray.pipeline.stages import METRICS_FILE, NAMES, PAIR_FLOW, PAIR_STAGES, REPORT_FILE
from vce_ray.run_config import RunConfig
from vce_ray.storage.errors import StoreError
from vce_ray.training import HISTORY_FILE
from vce_ray.training.objectives import objective_for

if TYPE_CHECKING:
    from vce_ray.training.train import Trainings

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
"""Settings in which runs that are erased together must agree."""
REPORTED_PAIRS = 24
"""Training pairs that are read for a report."""

Failures = dict[str, BaseException]


def erase(
    runs: Sequence[Run],
    pairs_only: bool = False,
    open_session: Callable[[], AbstractContextManager[None]] = session,
) -> dict[str, dict[str, Any] | BaseException]:
    """Run every stage of every run that is not published yet.

    A run that another driver is making is left alone. The failure of a run is recorded in its run.json before it is
    returned or raised.

    Args:
        pairs_only: stop each run once its pair set is published; the same call without it resumes from there.
        open_session: opens the Ray session to work in. By default the one that is open is used, if there is one.

    Returns:
        By run name: the metrics of its evaluation, {} if it stops at its pairs, or the exception it failed with.

    Raises:
        UserError: the runs disagree in settings that they must share, two have the same name, or another driver took
            one of them over because this one gave no sign of life.
        KeyboardInterrupt, and errors that no single run is to blame for.
    """
    failures: Failures = {}
    open_runs: dict[str, Run] = {}
    _check_shared(runs)
    with ExitStack() as sessions:  # outermost: Ray may end the process while it shuts down under a training
        try:
            _start(runs, open_runs, failures)
            if any(run.unfinished for run in open_runs.values()):
                sessions.enter_context(open_session())
            _erase(open_runs, failures, pairs_only)
        except KeyboardInterrupt as error:
            lost = _finish_all(open_runs, "stopped", str(error) or "interrupted")
            if lost:
                raise UserError(lost) from error
            raise
        except BaseException as error:
            _finish_all(open_runs, "failed", format_error(error))
            raise
    return {run.name: failures.get(run.name) or _metrics(run) for run in runs}


def _start(runs: Sequence[Run], open_runs: dict[str, Run], failures: Failures) -> None:
    """Start the runs that are not finished. Adds each to `open_runs`, or to `failures` if it cannot be started."""
    todo = [run for run in runs if run.unfinished or run.record["status"] != "done"]

    def start(run: Run) -> None:
        try:
            run.start()
            open_runs[run.name] = run
        except (UserError, StoreError) as error:
            failures[run.name] = error

    with ThreadPoolExecutor(max(1, len(todo))) as pool:  # each may wait a minute for a sign of life of another driver
        try:
            list(pool.map(start, todo))
        except KeyboardInterrupt:
            for run in todo:
                if run.name not in open_runs:
                    run.lease.release()
            raise
    for run in runs:
        for stage in NAMES:
            if run.name not in failures and run.done(stage):
                run.log_stage(stage, "published before")


def _metrics(run: Run) -> dict[str, Any]:
    return run.store.read_json(METRICS_FILE) if run.done("report") else {}


def _check_shared(runs: Sequence[Run]) -> None:
    first = runs[0]
    for number, run in enumerate(runs):
        if run.name in {other.name for other in runs[:number]}:
            raise UserError(f"two runs are named {run.name}: give one of them another name")
        for field, of in SHARED.items():
            if of(run.config) != of(first.config):
                raise UserError(
                    f"runs {first.name} and {run.name} share actors and images, but differ in {field}: "
                    "give them the same, or erase them with separate commands"
                )


def _erase(runs: dict[str, Run], failures: Failures, pairs_only: bool) -> None:
    for run in [run for run in runs.values() if not run.unfinished]:
        run.finish("done")  # its driver ended between its last stage and its own end
        del runs[run.name]
    if not runs:
        return
    _check_stores(runs)
    for run in runs.values():
        run.tracking.open(run.record)
        if not run.done("prompts"):
            _prompts(run)

    def fail(run: Run, error: BaseException) -> None:
        failures[run.name] = error
        run.finish("failed", format_error(error))
        del runs[run.name]

    trainings = None if pairs_only else _trainings(dict(runs))
    try:
        under_way: dict[Future[None], Run] = {}

        def train_or_fail(run: Run, error: BaseException | None) -> None:
            if error is not None:
                fail(run, error)
            elif trainings is not None:
                under_way[_train(run, trainings)] = run

        _pairs(dict(runs), train_or_fail)
        trained: dict[str, Run] = {}
        while under_way or trained:
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                if error := future.exception():
                    fail(run, error)
                else:
                    trained[run.name] = run
            # evaluate once fewer trainings are left than fit at once: until then the cluster is busy anyway
            if trained and trainings and len(under_way) < trainings.concurrency:
                _evaluate(trained, fail)
                trained = {}
    finally:
        if trainings is not None:
            trainings.close()
    for run in runs.values():
        if run.done("report"):
            run.finish("done")
        else:
            run.finish("stopped", "after its pairs, as requested")


def _check_stores(runs: Mapping[str, Run]) -> None:
    from vce_ray.pipeline.nodes import check_stores

    check_stores([run.store for run in runs.values()])


def _trainings(runs: Mapping[str, Run]) -> Trainings:
    from vce_ray.training.train import Trainings

    configs = [run.config.train for run in runs.values()]
    return Trainings(
        configs,
        min(_concurrent_trainings(configs[0]), len(runs)),
        on_start=lambda name: runs[name].start_stage("training"),
        on_step=lambda name, row: runs[name].take_step(row),
        on_finish=lambda name: _finish_training(runs[name]),
    )


def _concurrent_trainings(config: TrainConfig) -> int:
    """How many trainings the cluster has room for at once."""
    import ray

    cluster, workers = ray.cluster_resources(), config.num_workers or 1
    return max(1, int(cluster.get("GPU", 0) or cluster.get("CPU", 1)) // workers)


def _finish_all(runs: Mapping[str, Run], status: str, error: str) -> str | None:
    """Record the end of all runs, except those that another driver took over. Returns why it did, for one of them."""
    for run in runs.values():
        if run.lease.lost is None:
            run.finish(status, error)
    return next((run.lease.lost for run in runs.values() if run.lease.lost), None)


# The stages -----------------------------------------------------------------------------------------------------------


def _prompts(run: Run) -> None:
    from vce_ray.evaluation.judges import judge_stamp
    from vce_ray.evaluation.prompts import evaluation_prompts
    from vce_ray.pairs.build import run_prompts
    from vce_ray.pipeline.pair_flow import publish_prompts

    def log(line: str) -> None:
        run.log_stage("prompts", line)

    run.start_stage("prompts")
    publish_prompts(run.store.stage("prompts"), lambda: run_prompts(run.config, run.concept, log))
    stamp = judge_stamp(run.config, run.concept)
    publish_prompts(run.store.stage("evaluation/prompts"), lambda: evaluation_prompts(run.config, run.concept), **stamp)
    kinds = run.store.stage("prompts").inventory(["kind"])["kind"].to_pylist()
    run.finish_stage("prompts", **run.row_counts("prompts"), erase=kinds.count("erase"))


def _pairs(runs: Mapping[str, Run], on_ready: Callable[[Run, BaseException | None], None]) -> None:
    """Make the pair sets that are missing. Calls `on_ready(run, error)` for each run."""
    from vce_ray.pipeline.before_after import evaluation_step
    from vce_ray.pipeline.pair_flow import make_pairs
    from vce_ray.pipeline.reuse import reuse_pairs

    def finish(task: Task, error: BaseException | None) -> None:
        run = runs[task.name]
        if error is None:
            for stage in PAIR_STAGES:
                if not run.done(stage):
                    run.finish_stage(stage, **run.row_counts(stage))
        on_ready(run, error)

    for run in runs.values():
        run.start_stage(*(stage for stage in PAIR_STAGES if not run.done(stage)))
        if run.config.pairs_of:
            reuse_pairs(run.task)
    tasks = {run.name: run.task.for_workers() for run in runs.values()}
    make_pairs(tasks, evaluation_step("before", tasks), finish)


def _train(run: Run, trainings: Trainings) -> Future[None]:
    """Queue a run for training, unless it is trained already. Returns a future that is done when it is trained."""
    if run.store.exists(HISTORY_FILE):
        trained: Future[None] = Future()
        trained.set_result(None)
        if not run.done("training"):
            run.start_stage("training")
            _finish_training(run)
        return trained
    facts = {"concept": run.concept.name, "run": run.name, "method": run.config.train.method}
    return trainings.submit(run.name, run.task.for_workers().config, run.store, facts)


def _finish_training(run: Run) -> None:
    last = run.store.read_json(HISTORY_FILE)[-1]
    run.finish_stage(
        "training", **{key: round(last[key], 4) for key in ("step", "loss", "margin", "accuracy") if key in last}
    )


def _evaluate(runs: Mapping[str, Run], fail: Callable[[Run, BaseException], None]) -> None:
    from vce_ray.pipeline.before_after import evaluate_after

    todo = [run for run in runs.values() if not run.done("evaluation")]
    for run in todo:
        run.start_stage("evaluation")
    if todo:
        evaluate_after({run.name: run.task.for_workers() for run in todo})
    for run in runs.values():
        try:
            _report(run)
        except Exception as error:  # it concerns this run's images alone
            fail(run, error)


def _report(run: Run) -> None:
    from vce_ray.evaluation.detectors import evaluation_schema
    from vce_ray.evaluation.metrics import columns_to_read, evaluate
    from vce_ray.evaluation.model_card import write_model_card
    from vce_ray.evaluation.report import write_report
    from vce_ray.pipeline.before_after import read_before_after

    if not run.done("evaluation"):
        columns = columns_to_read(evaluation_schema(run.config, run.concept))
        metrics = evaluate(read_before_after(run.store, columns), run.concept)
        run.store.write_json(METRICS_FILE, metrics)
        shown = ("seen_before", "seen_after", "kept_drop", "score_drop")
        run.finish_stage("evaluation", **{key: round(metrics[key], 4) for key in shown if metrics[key] is not None})
    if not run.done("report"):
        run.start_stage("report")
        data = report_data(run)
        run.tracking.log_evaluation(data)
        write_model_card(run.task, data)
        run.store.write_bytes(REPORT_FILE, write_report(data).encode())
        run.finish_stage("report", page=run.store.where(REPORT_FILE))


def report_data(run: Run):
    """Read everything that a run's report shows from its published stages."""
    from vce_ray.evaluation.detectors import evaluation_schema
    from vce_ray.evaluation.report import ReportData
    from vce_ray.pipeline.before_after import read_before_after

    rejects = [
        run.store.stage(f"rejects/{name}").read(allow_missing=True, columns=schemas.REJECTS.names) for name in PAIR_FLOW
    ]
    return ReportData(
        run=run.record,
        concept=run.concept,
        metrics=run.store.read_json(METRICS_FILE),
        evaluation=read_before_after(run.store, evaluation_schema(run.config, run.concept).names).to_pylist(),
        pairs=run.store.stage("pairs").read().slice(0, REPORTED_PAIRS).to_pylist(),
        training=run.store.read_json(HISTORY_FILE),
        curves=objective_for(run.config.train).curves,
        rejects=[row for table in rejects for row in table.to_pylist()],
    )
