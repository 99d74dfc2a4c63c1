"""The folder of a published stage is a Parquet dataset with each key once, whoever was late, killed or retried."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from test_store import rows, run_python

from vce_ray.storage.store import Stage, Store, StoreError


@pytest.fixture
def store(store_uri: str) -> Store:
    return Store(store_uri)


def assert_dataset(stage: Stage, *numbers: int) -> None:
    """Check that pandas and pyarrow read exactly these rows from the stage's folder, and that it holds nothing else."""
    place = stage.store.root, stage.store.filesystem
    expected = rows(*sorted(numbers, key=lambda n: f"row-{n}"))
    assert stage.read().equals(expected)
    read = pd.read_parquet(place[0], filesystem=place[1]).sort_values("id", ignore_index=True)
    assert read.equals(expected.to_pandas())
    assert ds.dataset(place[0], filesystem=place[1]).to_table().sort_by("id").equals(expected)
    manifest = stage.manifest()
    assert manifest is not None and manifest["rows"] == len(numbers)
    assert stage.store.list() == ["_manifest.json", *stage.parts()]
    assert {file for file in stage.store.list() if file.endswith(".parquet")} == set(stage.parts())


def test_rows_that_were_made_twice_and_parts_of_dead_workers_are_gone(store: Store) -> None:
    stage = store.stage("run/stage")
    stage.write_part(rows(9))  # of a worker that died, and of another batching of the same rows
    for batch in ((0, 1, 2), (2, 3), (3, 0), (4,), (4, 4), (5, 5)):
        stage.write_part(rows(*batch))
    listed = [part for part in stage.parts() if stage.read_part(part)["n"].to_pylist() != [9]]
    manifest = stage.publish(listed, key="id")
    assert sum(part["rows"] for part in manifest["parts"]) == manifest["rows"] == 6
    assert manifest["bytes"] == sum(len(stage.store.read_bytes(part)) for part in stage.parts())
    assert_dataset(stage, 0, 1, 2, 3, 4, 5)


def test_pandas_reads_a_stage_by_its_path_or_uri(store: Store, store_uri: str) -> None:
    if store_uri.startswith("gs://"):
        pytest.skip("without credentials pyarrow reads gs:// by its own URI only")
    stage = store.stage("_old/stage")  # only names inside the folder are skipped
    stage.publish([stage.write_part(rows(1, 0)), stage.write_part(rows(2))], key="id")
    assert pd.read_parquet(stage.store.uri).sort_values("n")["id"].tolist() == ["row-0", "row-1", "row-2"]
    images = store.stage("images")
    table = pa.table({"id": ["a"], "tokens": [[1, 65535]], "image": [b"\x00png"]})
    images.publish([images.write_part(table)], key="id")
    (row,) = pd.read_parquet(images.store.uri).to_dict("records")
    assert row["id"] == "a" and list(row["tokens"]) == [1, 65535] and row["image"] == b"\x00png"


def test_rows_that_differ_are_refused_before_anything_is_written(store: Store) -> None:
    stage = store.stage("stage")
    parts = [stage.write_part(rows(0, 1)), stage.write_part(rows(1, 2)), stage.write_part(rows(2, text="other"))]
    with pytest.raises(ValueError, match="two different rows have id 'row-2'"):
        stage.publish(parts, key="id")
    assert stage.store.list() == sorted(parts)


def test_a_part_that_comes_after_publication_does_not_stay(store: Store) -> None:
    stage = store.stage("stage")
    stage.publish([stage.write_part(rows(0)), stage.write_part(rows(1))], key="id")
    stage.write_part(rows(7))
    assert stage.write_part(rows(1)) in stage.parts()  # a worker that is retried
    assert_dataset(stage, 0, 1)


@pytest.mark.parametrize("step", ["create_json", "sweep"])
def test_a_publisher_that_is_killed_can_be_repeated(store: Store, store_uri: str, step: str) -> None:
    """Killed when it writes the manifest, after it has written parts again; and before it deletes parts."""
    code = """
import os, sys
import pyarrow as pa
from vce_ray.storage.store import Stage, Store
stage = Store(sys.argv[1]).stage('stage')
for batch in ([0, 1], [1, 2], [2, 3]):
    names = [f'row-{n}' for n in batch]
    stage.write_part(pa.table({'id': names, 'n': batch, 'text': [f'text {n}' for n in batch]}))
if sys.argv[2] == 'sweep':
    Stage.sweep = lambda self: os._exit(9)
else:
    Store.create_json = lambda *_: os._exit(9)
stage.publish(stage.parts(), key='id')
"""
    assert run_python(code, store_uri, step).returncode == 9
    stage = store.stage("stage")
    assert len([file for file in stage.store.list() if file.endswith(".parquet")]) > 3
    if step == "sweep":
        stage.sweep()
    else:
        assert not stage.published()
        stage.sweep()  # deletes nothing before publication
        stage.publish(stage.parts(), key="id")
    assert_dataset(stage, 0, 1, 2, 3)


class Overtaken(Store):
    """A store in which somebody else publishes the stage after the first call of `method`."""

    def __init__(self, uri: str, method: str):
        super().__init__(uri)
        self.method = method

    def _then_publish(self, method: str) -> None:
        if method == self.method:
            self.method = ""
            stage = Stage(Store(self.uri))
            stage.publish([part for part in stage.parts() if stage.read_part(part).num_rows == 3], key="id")

    def list(self, path: str = "") -> list[str]:
        found = super().list(path)
        self._then_publish("list")
        return found

    def exists(self, path: str) -> bool:
        found = super().exists(path)
        self._then_publish(f"exists {path}")
        return found


def test_a_reader_whose_parts_are_deleted_by_publication_reads_those_published(store: Store) -> None:
    stage = store.stage("stage")
    parts = [stage.write_part(rows(*batch)) for batch in ((0, 1, 2), (0,), (2,), (1,))]
    overtaken = Stage(Overtaken(stage.store.uri, "list"))
    assert overtaken.inventory(["n"])["n"].to_pylist() == [0, 1, 2]
    assert stage.parts() == [parts[0]] and stage.published()
    stage.store.delete_prefix(parts[0])
    with pytest.raises(StoreError, match="file not found"):
        overtaken.inventory()


def test_a_publisher_that_is_overtaken_is_told(store: Store) -> None:
    stage = store.stage("stage")
    parts = [stage.write_part(rows(0, 1, 2)), stage.write_part(rows(0)), stage.write_part(rows(3))]
    with pytest.raises(ValueError, match="already published and cannot change"):
        Stage(Overtaken(stage.store.uri, "exists manifest.json")).publish(parts[1:], key="id")
    assert_dataset(stage, 0, 1, 2)


def test_writers_that_are_late_and_readers_are_not_disturbed(store: Store) -> None:
    """Workers write the same rows again, and readers look on, while the stage is published."""
    stage = store.stage("stage")
    parts = [stage.write_part(rows(n, n + 1)) for n in range(6)]
    ended = Event()

    def write(first: int) -> None:
        for n in range(12):
            stage.write_part(rows((first + n) % 6, (first + 3 * n) % 6))

    def look() -> set[int]:
        seen = set()
        while not ended.is_set():
            seen |= {stage.inventory().num_rows, stage.read(["n"], allow_missing=True).num_rows}
        return seen

    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        writing = [pool.submit(write, first) for first in range(2)]
        stage.publish(parts, key="id")
        for writer in writing:
            writer.result()
        ended.set()
        assert {count for reader in looking for count in reader.result()} <= {0, 7}
    assert_dataset(stage, *range(7))


def test_a_manifest_of_version_0_1_is_a_manifest(store: Store) -> None:
    stage = store.stage("run/stage")
    manifest = stage.publish([stage.write_part(rows(0, 1))], key="id")
    stage.store.write_json("manifest.json", manifest)
    stage.store.delete_prefix("_manifest.json")
    assert stage.manifest() == manifest and stage.read().equals(rows(0, 1))
    stage.store.write_bytes(part := "part-of-a-dead-worker.parquet", b"")
    stage.sweep()
    assert part not in stage.store.list()
    with pytest.raises(ValueError, match="already published"):
        stage.publish(stage.parts(), key="id")
    stage.store.write_json("manifest.json", [])
    with pytest.raises(StoreError, match=r"stage/manifest\.json.* is corrupt"):
        stage.manifest()


@pytest.mark.parametrize("manifest", ["manifest.json", "_manifest.json", "_files.json"])
def test_a_deletion_that_is_interrupted_leaves_nothing_that_looks_complete(tmp_path: Path, manifest: str) -> None:
    store = Store(tmp_path)
    store.write_bytes("run/stage/part-0.parquet", b"0")
    store.write_bytes(f"run/stage/{manifest}", b"{}")
    code = """
import os, sys
import shutil
from vce_ray.storage.store import Store
store = Store(sys.argv[1])
class Killed(type(store.filesystem)):
    def delete_dir(self, path): os._exit(9)
store.filesystem = Killed()
store.delete_prefix('run')
"""
    assert run_python(code, str(tmp_path)).returncode == 9
    assert store.list() == ["run/stage/part-0.parquet"]
