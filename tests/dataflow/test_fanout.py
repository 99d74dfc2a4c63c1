"""Row references: which rows are open, which are batched together, and how actors process them.

That they flow through real runs is shown in tests/pipeline/test_pipeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from tiny_runs import tiny_config

from benchmarks.data_plane import source, steps
from vce_ray.concepts.load import load_concept
from vce_ray.config import PoolConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import (
    ERROR,
    ERRORS,
    Core,
    Step,
    TooManyRejects,
    Worker,
    batched,
    bisect_failures,
    flow,
    open_refs,
    publish,
)
from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.storage.errors import StoreError
from vce_ray.storage.store import Store

RESULTS = pa.schema([("made_id", pa.string()), ("source_id", pa.string())])


def core() -> Core:
    return lambda rows: ([], [])


def step(core: str = "test_fanout:core", settings: Mapping[str, Any] | None = None, **more) -> Step:
    return Step("made", "source", RESULTS, "source_id", core, settings or {}, **more)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A run with six source rows in two parts; r0 and r5 ask for the same image."""
    store = Store(tmp_path)
    stage = store.stage("source")
    rows = [
        {"id": f"r{i}", "kind": "erase" if i % 2 else "keep", "prompt": f"p{i % 5}", "seed": i % 5} for i in range(6)
    ]
    stage.publish([stage.write_part(pa.Table.from_pylist(part)) for part in (rows[:3], rows[3:])], key="id")
    return Task("run", tiny_config(), load_concept("deer"), store)


def test_finished_and_rejected_rows_are_not_processed_again(task: Task) -> None:
    assert sorted(open_refs(task, step())["key"].to_pylist()) == [f"r{i}" for i in range(6)]
    task.store.stage("made").write_part(pa.Table.from_pylist([{"made_id": "m1", "source_id": "r1"}], RESULTS))
    bad = {"row_id": "r2", "stage": "made", "reason": "fault", "detail": "", "attempt": 1}
    task.store.stage("rejects/made").write_part(pa.Table.from_pylist([bad], schemas.REJECTS))
    refs = open_refs(task, step())
    assert sorted(refs["key"].to_pylist()) == ["r0", "r3", "r4", "r5"]
    assert set(refs["run"].to_pylist()) == {"run"} and set(refs["next"].to_pylist()) == {"made"}
    for ref in refs.to_pylist():
        assert ref["key"] in task.store.stage("source").read_part(ref["part"])["id"].to_pylist()
    wanted = open_refs(task, step(wants=lambda row: row["kind"] == "erase", wants_columns=("kind",)))
    assert sorted(wanted["key"].to_pylist()) == ["r3", "r5"]
    publish(task, step())
    assert open_refs(task, step()).num_rows == 0


def refs_to(*rows: tuple[str, str]) -> pa.Table:
    """References in this order, each a (key, what it asks for)."""
    columns = {name: ["x"] * len(rows) for name in schemas.ROW_REF.names}
    return pa.table(columns | {"key": [key for key, _ in rows], "alike": [kind for _, kind in rows]})


def test_equal_work_is_batched_together_in_order_of_first_appearance() -> None:
    refs = refs_to(("r0", "home"), ("r1", "fox"), ("r2", "cat"), ("r3", "dog"), ("r4", "home"), ("r5", "cat"))
    batches = list(batched(refs, 2))
    assert [batch["key"].to_pylist() for batch in batches] == [["r0", "r4", "r1"], ["r2", "r5", "r3"]]
    assert all(batch.schema.names == schemas.ROW_REF.names for batch in batches)
    assert [len(batch) for batch in batched(refs, 3)] == [5, 1]
    assert list(batched(refs.slice(0, 0), 2)) == []


def test_rows_that_want_the_same_image_are_alike(task: Task) -> None:
    alike = {ref["key"]: ref["alike"] for ref in open_refs(task, step(alike=("prompt", "seed"))).to_pylist()}
    assert alike["r0"] == alike["r5"] and len(set(alike.values())) == 5
    assert len(set(open_refs(task, step())["alike"].to_pylist())) == 6, "by default a row is only like itself"


def test_a_failing_row_is_rejected_alone_and_a_failing_store_blames_no_row() -> None:
    def hot(rows: list[Row]) -> Outcome:
        if any(row["key"] == "r3" for row in rows):
            raise RuntimeError("too hot")
        return [{"made": row["key"]} for row in rows], []

    rows: list[Row] = [{"run": "run", "key": f"r{i}"} for i in range(6)]
    made, rejects = bisect_failures(hot, rows, "made")
    assert [row["made"] for row in made] == ["r0", "r1", "r2", "r4", "r5"]
    assert [(row["row_id"], row["reason"], row["detail"]) for row in rejects] == [
        ("r3", "fault", "RuntimeError: too hot")
    ]

    def down(rows: list[Row]) -> Outcome:
        raise StoreError("no answer")

    with pytest.raises(StoreError):
        bisect_failures(down, rows, "made")


def test_a_store_error_in_an_actor_arrives_as_itself(task: Task) -> None:
    refs = open_refs(task, step()).select(schemas.ROW_REF.names)
    for part in task.store.stage("source").parts():
        task.store.delete_prefix(f"source/{part}")
    (ref,) = Worker([step()], {}, {"run": task})(refs).to_pylist()
    assert ref["next"] == ERROR and ERRORS[ref["part"]] is StoreError and "source" in ref["key"]


def test_too_many_rejects_name_their_reasons(task: Task) -> None:
    task.store.stage("made").write_part(pa.Table.from_pylist([{"made_id": "m1", "source_id": "r1"}], RESULTS))
    bad = [{"row_id": f"r{i}", "stage": "made", "reason": "too dark", "detail": "", "attempt": 1} for i in (2, 3)]
    task.store.stage("rejects/made").write_part(pa.Table.from_pylist(bad, schemas.REJECTS))
    with pytest.raises(TooManyRejects, match=r"rejected 2 of 3 rows.*0\.5: too dark \(2\).*retry-rejects"):
        publish(task, step(), 0.5)
    assert publish(task, step(), 0.7)["facts"] == {"rejected": 2}


@pytest.fixture
def fake_gpu():
    """A Ray with one GPU that exists only as a resource."""
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.mark.integration
def test_actors_with_gpus_take_batches_as_they_were_made(tmp_path: Path, fake_gpu: None) -> None:
    task = Task("run", tiny_config(), load_concept("deer"), Store(tmp_path))
    source(task, 10)
    draw, caption = steps({"draw": 0.0, "caption": 0.0}, image_bytes=8)
    half = PoolConfig(min_actors=1, max_actors=1, gpus_per_actor=0.5)
    batches = list(batched(open_refs(task, draw), 4))
    ended = list(flow(batches, [([draw], half), ([caption], half)], {"run": task}, 4))
    assert {ref["key"] for ref in ended} == {f"cs{number:07d}" for number in range(10)} and len(ended) == 10
    drawn = task.store.stage("drawn")
    assert sorted(drawn.read_part(part).num_rows for part in drawn.parts()) == [2, 4, 4]
    publish(task, draw)
    read = ray.data.read_parquet(drawn.store.root).take_all()
    assert sorted(row["sample_id"] for row in read) == drawn.read()["sample_id"].to_pylist()


@pytest.mark.integration
def test_an_actor_that_cannot_use_its_model_ends_the_flow_in_one_line(task: Task, fake_gpu: None) -> None:
    unusable = step(core="vce_ray.pairs.captioner:open_captioner", settings={"name": "vllm:no/such"})
    batches = list(batched(open_refs(task, unusable), 4))
    pool = PoolConfig(min_actors=1, max_actors=1, gpus_per_actor=0.0)
    with pytest.raises(UserError, match=r"^captioner 'vllm:no/such' runs in vLLM"):
        list(flow(batches, [([unusable], pool)], {"run": task}, 4))
