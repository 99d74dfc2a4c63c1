"""Claims to rows: which are open, which are taken together, and that they flow through actors with GPUs. That they do
so without is shown in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import ray

from benchmarks.data_plane import source, steps
from vce_ray.concepts.concept import load_concept
from vce_ray.config import PoolConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import (
    FAULT,
    FAULTS,
    Core,
    RejectedTooMuch,
    Step,
    Worker,
    _carefully,
    batched,
    flow,
    open_claims,
    publish,
)
from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.dataflow.task import Task
from vce_ray.run_config import RunConfig
from vce_ray.storage.errors import StoreError
from vce_ray.storage.store import Store

MADE = pa.schema([("made_id", pa.string()), ("source_id", pa.string())])


def core() -> Core:
    return lambda rows: ([], [])


def step(**more) -> Step:
    return Step("made", "source", MADE, "source_id", "test_fanout:core", {}, **more)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A run with six source rows in two parts, two of which ask for the same."""
    store = Store(tmp_path)
    source = store.stage("source")
    rows = [
        {"id": f"r{i}", "kind": "erase" if i % 2 else "keep", "prompt": f"p{i % 5}", "seed": i % 5} for i in range(6)
    ]
    source.publish([source.write_part(pa.Table.from_pylist(part)) for part in (rows[:3], rows[3:])], key="id")
    return Task("run", RunConfig(concept="deer"), load_concept("deer"), store)


def test_rows_that_were_made_or_rejected_are_not_claimed_again(task: Task) -> None:
    assert sorted(open_claims(task, step())["key"].to_pylist()) == [f"r{i}" for i in range(6)]
    task.store.stage("made").write_part(pa.Table.from_pylist([{"made_id": "m1", "source_id": "r1"}], MADE))
    bad = {"row_id": "r2", "stage": "made", "reason": "fault", "detail": "", "attempt": 1}
    task.store.stage("rejects/made").write_part(pa.Table.from_pylist([bad], schemas.REJECTS))
    claims = open_claims(task, step())
    assert sorted(claims["key"].to_pylist()) == ["r0", "r3", "r4", "r5"]
    assert set(claims["run"].to_pylist()) == {"run"} and set(claims["next"].to_pylist()) == {"made"}
    for row in claims.to_pylist():
        assert row["key"] in task.store.stage("source").read_part(row["part"])["id"].to_pylist()
    wanted = open_claims(task, step(wants=lambda row: row["kind"] == "erase", asks=("kind",)))
    assert sorted(wanted["key"].to_pylist()) == ["r3", "r5"]
    publish(task, step())
    assert open_claims(task, step()).num_rows == 0


def test_claims_to_the_same_picture_are_taken_together(task: Task) -> None:
    claims = open_claims(task, step(alike=("prompt", "seed")))
    keys = claims["key"].to_pylist()
    batches = list(batched(claims, 2))
    assert [len(batch) for batch in batches] in ([3, 2, 1], [2, 3, 1], [2, 2, 2], [3, 2, 1])
    assert sorted(key for batch in batches for key in batch["key"].to_pylist()) == sorted(keys)
    (home,) = [batch for batch in batches if "r0" in batch["key"].to_pylist()]
    assert "r5" in home["key"].to_pylist()  # both ask for p0 with seed 0
    assert batches[0]["key"][0].as_py() == keys[0]  # the first run is served first
    assert all(batch.schema == schemas.CLAIM for batch in batches)
    assert list(batched(claims.slice(0, 0), 2)) == []


def test_a_row_at_fault_is_rejected_alone_and_a_store_at_fault_is_not_a_row() -> None:
    def hot(rows: list[Row]) -> Outcome:
        if any(row["key"] == "r3" for row in rows):
            raise RuntimeError("too hot")
        return [{"made": row["key"]} for row in rows], []

    rows: list[Row] = [{"run": "run", "key": f"r{i}"} for i in range(6)]
    made, rejects = _carefully(hot, rows, "made")
    assert [row["made"] for row in made] == ["r0", "r1", "r2", "r4", "r5"]
    assert [(row["row_id"], row["reason"], row["detail"]) for row in rejects] == [
        ("r3", "fault", "RuntimeError: too hot")
    ]

    def down(rows: list[Row]) -> Outcome:
        raise StoreError("no answer")

    with pytest.raises(StoreError):
        _carefully(down, rows, "made")


def test_a_store_at_fault_in_an_actor_is_told_as_itself(task: Task) -> None:
    claims = open_claims(task, step()).select(schemas.CLAIM.names)
    for part in task.store.stage("source").parts():
        task.store.delete_prefix(f"source/{part}")
    (told,) = Worker([step()], {}, {"run": task})(claims).to_pylist()
    assert told["next"] == FAULT and FAULTS[told["part"]] is StoreError and "source" in told["key"]


def test_too_many_rejects_name_their_reasons(task: Task) -> None:
    task.store.stage("made").write_part(pa.Table.from_pylist([{"made_id": "m1", "source_id": "r1"}], MADE))
    bad = [{"row_id": f"r{i}", "stage": "made", "reason": "too dark", "detail": "", "attempt": 1} for i in (2, 3)]
    task.store.stage("rejects/made").write_part(pa.Table.from_pylist(bad, schemas.REJECTS))
    with pytest.raises(RejectedTooMuch, match=r"rejected 2 of 3 rows.*0\.5: too dark \(2\).*retry-rejects"):
        publish(task, step(), 0.5)
    assert publish(task, step(), 0.7)["facts"] == {"rejected": 2}


@pytest.fixture
def fake_gpu():
    """A Ray with one GPU, which is a number to it."""
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def test_actors_with_gpus_take_batches_as_they_were_made(tmp_path: Path, fake_gpu: None) -> None:
    task = Task("run", RunConfig(concept="deer"), load_concept("deer"), Store(tmp_path))
    source(task, 10)
    draw, say = steps({"draw": 0.0, "caption": 0.0}, image_bytes=8)
    half = PoolConfig(min_actors=1, max_actors=1, gpus_per_actor=0.5)
    batches = list(batched(open_claims(task, draw), 4))
    ended = list(flow(batches, [([draw], half), ([say], half)], {"run": task}, 4))
    assert {claim["key"] for claim in ended} == {f"cs{number:07d}" for number in range(10)} and len(ended) == 10
    drawn = task.store.stage("drawn")
    assert sorted(drawn.read_part(part).num_rows for part in drawn.parts()) == [2, 4, 4]
