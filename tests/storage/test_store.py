"""The store on a local disk, and on S3 and GCS over HTTP: published data stays intact, and errors name the fix."""

import http.client
import http.server
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from vce_ray import env
from vce_ray.storage.store import Stage, Store, StoreError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(store_uri: str) -> Store:
    return Store(store_uri)


def rows(*numbers: int, text: str = "text") -> pa.Table:
    """Return a table with one row for each number."""
    return pa.table({"id": [f"row-{n}" for n in numbers], "n": list(numbers), "text": [f"{text} {n}" for n in numbers]})


def published(store: Store, name: str = "stage") -> Stage:
    stage = store.stage(name)
    stage.publish([stage.write_part(rows(2, 0)), stage.write_part(rows(1))], key="id")
    return stage


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process, in the root of the repository."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[str]:
    """Run a server that answers every request with `answer`; yield its host:port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def body_of(request: http.server.BaseHTTPRequestHandler) -> bytes:
    """Return a request's body, which pyarrow sends in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def failing(
    status: int, code: str, seen: list[str], text: str = "no"
) -> Callable[[http.server.BaseHTTPRequestHandler], tuple[int, bytes]]:
    """Return an `answer` that always fails with the same S3 error and records the requests in `seen`."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[int, bytes]:
        seen.append(request.command)
        body_of(request)
        return status, f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()

    return answer


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_are_written_listed_and_deleted(store: Store) -> None:
    assert store.list() == [] and not store.exists("a")
    store.write_bytes("run/a.bin", b"one")
    store.write_bytes("run/a.bin", b"two")
    store.write_json("run/deep/b.json", {"name": "ünïcode", "n": 1})
    assert store.read_bytes("run/a.bin") == b"two"
    assert store.read_json("run/deep/b.json") == {"name": "ünïcode", "n": 1}
    assert store.list() == store.list("run") == ["run/a.bin", "run/deep/b.json"]
    assert store.exists("run/a.bin") and not store.exists("run") and not store.exists("ru")
    assert store.child("run").list() == ["a.bin", "deep/b.json"]
    store.delete_prefix("run/deep")
    store.delete_prefix("run/none")
    assert store.list("run") == ["run/a.bin"]
    store.delete_prefix("run")
    assert store.list() == []


def test_a_large_file_round_trips(store: Store) -> None:
    data = np.random.default_rng(0).bytes(25_000_000)  # several parts of a multipart upload
    store.write_bytes("large", data)
    assert store.read_bytes("large") == data


def test_missing_and_corrupt_files_are_named(store: Store) -> None:
    with pytest.raises(StoreError, match=r"reading .*/nothing\.json.* failed: file not found"):
        store.read_json("nothing.json")
    store.write_bytes("bad.json", b'{"half":')
    with pytest.raises(StoreError, match=r"bad\.json.* is corrupt: not valid JSON"):
        store.read_json("bad.json")


def test_a_folder_that_this_machine_does_not_have_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "elsewhere")
    for read in (
        lambda: store.read_json("run.json"),
        lambda: store.stage("unsafe").read_part("part-a.parquet"),
        lambda: store.stage("pairs").read(),
    ):
        with pytest.raises(StoreError, match=rf"{socket.gethostname()} has no folder .*/elsewhere.*; on a cluster,"):
            read()
    store.write_json("run.json", {})
    with pytest.raises(StoreError, match=r"file not found$"):
        store.read_json("nothing.json")


def test_a_file_is_never_read_half_replaced(store: Store) -> None:
    contents = [b"a" * 10, b"b" * 20]
    store.write_bytes("run.json", contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [store.write_bytes("run.json", contents[n % 2]) for n in range(150)])
        seen = {store.read_bytes("run.json")}
        while not writing.done():
            seen.add(store.read_bytes("run.json"))
    assert seen == set(contents)
    writing.result()


def test_only_one_of_several_creators_wins(store: Store) -> None:
    def create(number: int) -> bool:
        try:
            store.create_json("created.json", number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(create, range(4)))
    assert won.count(True) == 1 and store.read_json("created.json") == won.index(True)
    store.create_json("created.json", won.index(True))  # writing the same content again is not a conflict


@pytest.mark.parametrize("path", ["", "/", "/etc/passwd", "../other", "a/../../b", "a//b", "./a"])
def test_paths_stay_inside_the_store(store: Store, path: str) -> None:
    for operation in (store.read_bytes, store.delete_prefix, store.child, lambda p: store.write_bytes(p, b"")):
        with pytest.raises(ValueError, match="is not a valid path in a store"):
            operation(path)


def test_a_store_pickles_without_credentials(store: Store) -> None:
    stage = published(store)
    pickled = pickle.dumps(stage)
    assert len(pickled) < 500
    assert pickle.loads(pickled).read().equals(stage.read())
    for output in (pickled, pickle.dumps(store.filesystem), repr(stage).encode(), store.where().encode()):
        assert b"test-secret-key" not in output and b"test-access-key" not in output


# URIs -----------------------------------------------------------------------------------------------------------------


def test_settings_from_the_environment_become_part_of_the_uri(
    monkeypatch: pytest.MonkeyPatch, s3_uri: Callable
) -> None:
    host = parse_qs(urlsplit(s3_uri("x")).query)["endpoint_override"][0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}")
    store = Store("s3://vce-test/env-run/")
    assert store.uri == f"s3://vce-test/env-run?endpoint_override={host}&scheme=http&region=us-east-1"
    store.write_bytes("a", b"1")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"
    filesystem, path = fs.FileSystem.from_uri(store.uri)  # as Ray does
    assert filesystem.get_file_info(f"{path}/a").is_file


def test_local_uris_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs").uri == Store(f"file://{tmp_path}/runs").uri == Store(tmp_path / "runs").uri
    assert Store("runs").child("deer/x").uri == f"{tmp_path}/runs/deer/x"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is not a supported store"),
        ("s3:/bucket/runs", "'s3' is not a supported store"),
        ("S3//bucket/runs", "'S3' is not a supported store"),
        ("gs:bucket/runs", "'gs' is not a supported store"),
        (
            "azure://AKIA:hush@bucket/x",
            "'azure' is not a supported store: use a local path, s3://bucket/prefix or gs://",
        ),
        ("gs://AKIA:hush@bucket/x", "no credentials: set GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://bucket/x?region=hush", r"region is not supported in a store URI"),
        ("gs://bucket/x?scheme=http", "a GCS endpoint must be endpoint_override=host:port"),
        ("s3:///x", "is not a valid bucket name"),
        ("s3://ab/x", "3 to 63 letters"),
        ("s3://bucket/a/../b", "is not a valid store prefix"),
        ("s3://bucket/x?secret_key=hush", r"secret_key is not supported in a store URI"),
        ("s3://AKIA:hush@bucket/x", "no credentials: set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?endpoint_override=http://AKIA:hush@host:9000", "an S3 endpoint must be host:port"),
        ("s3://bucket/x?endpoint_override=host:9000&scheme=ftp", "an S3 endpoint must be host:port"),
    ],
)
def test_bad_uris_are_refused_without_showing_secrets(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Store(uri)
    assert "hush" not in str(caught.value) and "AKIA" not in str(caught.value)


def test_an_invalid_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({variable.name for variable in env.VARIABLES}) == len(env.VARIABLES)
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "-1")
    with pytest.raises(
        ValueError, match=r"VCE_RAY_STORE_DEADLINE_S='-1' is invalid: must be a finite number of seconds greater than 0"
    ):
        Store("runs")


# Stages ---------------------------------------------------------------------------------------------------------------


def test_a_published_stage_gives_each_key_once_in_order(store: Store) -> None:
    stage = store.stage("run/stage")
    parts = [stage.write_part(rows(3, 1)), stage.write_part(rows(1, 2)), stage.write_part(rows(3, 1))]
    assert parts[0] == parts[2] and stage.parts() == sorted(set(parts))
    assert not stage.published() and stage.manifest() is None
    manifest = stage.publish(parts, key="id", concept="deer")
    assert stage.manifest() == manifest and stage.published()
    assert manifest["rows"] == 3 and manifest["facts"] == {"concept": "deer"}
    assert manifest["schema"] == {"id": "string", "n": "int64", "text": "string"}
    assert sorted(part["rows"] for part in manifest["parts"]) == [1, 2]
    paths = [stage.store.full(part) for part in stage.parts()]
    assert manifest["bytes"] == sum(store.filesystem.get_file_info(path).size for path in paths)
    assert stage.read().equals(rows(1, 2, 3))
    assert stage.read(["text", "n"]).equals(rows(1, 2, 3).select(["text", "n"]))
    read_by_arrow = pq.read_table(paths, filesystem=store.filesystem)
    assert sorted(read_by_arrow["n"].to_pylist()) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"no column \['prompt'\]: it has \['id', 'n', 'text'\]"):
        stage.read(["prompt"])


def test_lists_images_and_nulls_round_trip(store: Store) -> None:
    stage = store.stage("images")
    schema = pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.uint16())), ("image", pa.binary())])
    full = pa.table({"id": ["b", "a"], "tokens": [[1, 2], [65535]], "image": [b"\x00png", None]}, schema)
    nulls = pa.table({"id": ["c"], "image": [None], "tokens": [None]})  # columns of type null, in another order
    stage.publish([stage.write_part(full), stage.write_part(nulls), stage.write_part(schema.empty_table())], key="id")
    table = stage.read(schema.names)
    assert table.schema.equals(schema)
    assert table.to_pylist() == [
        {"id": "a", "tokens": [65535], "image": None},
        {"id": "b", "tokens": [1, 2], "image": b"\x00png"},
        {"id": "c", "tokens": None, "image": None},
    ]


def test_a_stage_without_rows_keeps_its_schema(store: Store) -> None:
    stage = store.stage("empty")
    stage.publish([stage.write_part(rows().cast(rows(1).schema))], key="id")
    assert stage.read().num_rows == 0 and stage.read().schema.equals(rows(1).schema)


def test_an_unpublished_stage_cannot_be_read(store: Store) -> None:
    stage = store.stage("stage")
    stage.write_part(rows(1))
    with pytest.raises(StoreError, match=r"/stage.* is not published: run the stage"):
        stage.read()
    missing = stage.read(["id", "n"], allow_missing=True)
    assert missing.num_rows == 0 and missing.column_names == ["id", "n"]


def test_a_published_stage_never_changes(store: Store) -> None:
    stage = published(store)
    before = stage.read()
    late = stage.write_part(rows(9))
    with pytest.raises(ValueError, match="is already published and cannot change"):
        stage.publish([late], key="id")
    assert late not in stage.parts() and stage.read().equals(before)


@pytest.mark.parametrize(
    ("tables", "key", "message"),
    [
        ([], "id", "no parts to publish"),
        ([rows(1, 2), rows(2, text="other")], "id", "two different rows have id 'row-2'"),
        ([pa.table({"id": ["a", "a"], "n": [1, 2]})], "id", "two different rows have id 'a'"),
        ([rows(1)], "sample_id", "key column 'sample_id' is missing, or null in a row"),
        ([pa.table({"id": ["a", None]})], "id", "key column 'id' is missing, or null in a row"),
        ([rows(1), rows(2).drop(["text"])], "id", "has columns"),
        ([rows(1), rows(2).set_column(1, "n", pa.array(["2"]))], "id", "have conflicting column types"),
    ],
)
def test_invalid_parts_are_refused(store: Store, tables: list[pa.Table], key: str, message: str) -> None:
    stage = store.stage("stage")
    parts = [stage.write_part(table) for table in tables]
    with pytest.raises(ValueError, match=message):
        stage.publish(parts, key=key)
    assert not stage.published()


def test_identical_rows_may_contain_nan(store: Store) -> None:
    stage = store.stage("scores")
    score = pa.table({"id": ["a"], "score": [float("nan")]})
    more = pa.table({"id": ["a", "b"], "score": [float("nan"), 1.0]})
    assert stage.publish([stage.write_part(score), stage.write_part(more)], key="id")["rows"] == 2


def test_a_missing_or_corrupt_part_is_named(store: Store) -> None:
    stage = store.stage("stage")
    with pytest.raises(StoreError, match=r"part-none\.parquet.* file not found"):
        stage.publish(["part-none.parquet"], key="id")
    part = stage.write_part(rows(*range(100)))
    intact = stage.store.read_bytes(part)
    stage.publish([part], key="id")

    stage.store.write_bytes(part, intact[:-50])
    with pytest.raises(StoreError, match=rf"{part}.* is corrupt .*Delete this stage"):
        stage.read()
    flipped = bytearray(intact)
    flipped[intact.index(b"row-50") if b"row-50" in intact else 60] ^= 0xFF
    stage.store.write_bytes(part, flipped)
    with pytest.raises(StoreError, match=rf"{part}.* is corrupt"):
        stage.read()
    stage.store.delete_prefix(part)
    with pytest.raises(StoreError, match=rf"{part}.* file not found"):
        stage.read()


@pytest.mark.parametrize("content", [b'{"parts": [', b"[]", b'{"parts": []}', b""])
def test_a_corrupt_manifest_is_named(store: Store, content: bytes) -> None:
    stage = published(store)
    stage.store.write_bytes("_manifest.json", content)
    with pytest.raises(StoreError, match=r"_manifest\.json.* is corrupt"):
        stage.read()


def test_a_writer_that_dies_before_the_manifest_leaves_an_unpublished_stage(store: Store, store_uri: str) -> None:
    code = """
import os, sys
import pyarrow as pa
from vce_ray.storage.store import Store
stage = Store(sys.argv[1]).stage('stage')
for n in range(3):
    stage.write_part(pa.table({'id': [f'lost-{n}']}))
os._exit(9)
"""
    assert run_python(code, store_uri).returncode == 9
    stage = store.stage("stage")
    assert len(stage.store.list()) == 3 and not stage.published()
    assert stage.read(allow_missing=True).num_rows == 0
    published(store)
    assert stage.read()["n"].to_pylist() == [0, 1, 2]


def test_a_process_killed_during_a_local_write_leaves_no_file(tmp_path: Path) -> None:
    code = """
import os, sys
from vce_ray.storage.store import Store
os.fsync = lambda _: os._exit(9)
Store(sys.argv[1]).write_bytes('file', b'half')
"""
    assert run_python(code, str(tmp_path)).returncode == 9
    store = Store(tmp_path)
    assert len(os.listdir(tmp_path)) == 1 and store.list() == [] and not store.exists("file")


def test_only_one_of_two_writers_publishes(store: Store, store_uri: str) -> None:
    code = """
import sys
import pyarrow as pa
from vce_ray.storage.store import Store
stage = Store(sys.argv[1]).stage('stage')
writer = sys.argv[2]
parts = [stage.write_part(pa.table({'id': [f'{writer}-{n}'], 'writer': [writer]})) for n in range(3)]
print('ready', flush=True)
sys.stdin.readline()
try:
    stage.publish(parts, key='id', writer=writer)
except ValueError as error:
    assert 'already published' in str(error), error
    sys.exit(3)
"""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, store_uri, name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    codes = [writer.wait(timeout=300) for writer in writers]
    for writer in writers:
        writer.communicate()
    assert sorted(codes) == [0, 3]
    winner = ("one", "two")[codes.index(0)]
    stage = store.stage("stage")
    assert stage.read()["writer"].to_pylist() == [winner] * 3
    manifest = stage.manifest()
    assert manifest is not None and manifest["facts"] == {"writer": winner}


def test_many_rows_in_several_parts_are_read_in_order(tmp_path: Path) -> None:
    """More of them than are reordered at once."""
    numbers = np.random.default_rng(0).permutation(2100).tolist()
    stage = Store(tmp_path).stage("stage")
    stage.publish([stage.write_part(rows(*numbers[start : start + 700])) for start in (0, 700, 1400)], key="id")
    assert stage.read().equals(rows(*sorted(numbers, key=lambda n: f"row-{n}")))


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_is_uploaded_and_fetched(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "deep" / "b.bin").write_bytes(b"b" * 1000)
    store.upload(source, "run/adapter")
    target = store.fetch("run/adapter", tmp_path / "new" / "target")
    assert (target / "a.txt").read_text() == "a" and (target / "deep" / "b.bin").read_bytes() == b"b" * 1000

    (source / "a.txt").unlink()
    (source / "c.txt").write_text("c")
    store.upload(source, "run/adapter")
    store.fetch("run/adapter", target)
    assert sorted(str(file.relative_to(target)) for file in target.rglob("*.*")) == ["c.txt", "deep/b.bin"]
    assert not store.exists("run/adapter/a.txt")
    assert os.listdir(target.parent) == ["target"]


def test_a_folder_is_fetched_concurrently(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("a")
    store.upload(tmp_path / "source", "adapter")
    with ThreadPoolExecutor(4) as pool:
        for target in pool.map(lambda _: store.fetch("adapter", tmp_path / "cache" / "adapter"), range(12)):
            assert target.name == "adapter"
    assert (tmp_path / "cache" / "adapter" / "a.txt").read_text() == "a"
    assert os.listdir(tmp_path / "cache") == ["adapter"]


def test_an_incomplete_folder_is_refused(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "fetched" / "target"
    source.mkdir()
    target.parent.mkdir()
    with pytest.raises(ValueError, match="has no files to upload"):
        store.upload(source, "adapter")
    store.write_bytes("adapter/a.txt", b"started")
    with pytest.raises(StoreError, match=r"/adapter.* is missing or incomplete"):
        store.fetch("adapter", target)
    (source / "a.txt").write_text("a")
    store.upload(source, "adapter")
    store.write_bytes("adapter/a.txt", b"b")
    with pytest.raises(StoreError, match=r"adapter/a\.txt.* is corrupt"):
        store.fetch("adapter", target)
    store.delete_prefix("adapter/a.txt")
    with pytest.raises(StoreError, match=r"adapter/a\.txt.* file not found"):
        store.fetch("adapter", target)
    assert os.listdir(target.parent) == []


# Full disks -----------------------------------------------------------------------------------------------------------

FILL = """
import resource, signal, sys
import pyarrow as pa
from vce_ray.storage.store import Store, StoreError
stage = Store(sys.argv[1]).stage('stage')
if sys.argv[2] == 'limit':
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
small = stage.write_part(pa.table({'id': ['small']}))
try:
    stage.write_part(pa.table({'id': [f'{n * 7919 % 1000003:x}' * 3 for n in range(300_000)]}))
except StoreError as error:
    print(error)
stage.publish([small], key='id')
"""


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, kind: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "vce-test", str(tmp_path)]
    if kind == "disk" and (os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode):
        pytest.skip("only root can mount a small disk")
    try:
        done = run_python(FILL, str(tmp_path), kind)
        assert done.returncode == 0, done.stderr
        found = re.search(r"not enough space to write (\S+): ([\d,]+) bytes needed, ([\d,]+) free", done.stdout)
        assert found, done.stdout
        needed, free = (int(number.replace(",", "")) for number in found.groups()[1:])
        assert found[1].startswith(f"{tmp_path}/stage/part-") and needed > 1_000_000
        assert kind == "limit" or free < needed
        assert "Free some space" in done.stdout
        assert len(os.listdir(tmp_path / "stage")) == 2  # the small part and the manifest
        assert Store(tmp_path).stage("stage").read()["id"].to_pylist() == ["small"]
    finally:
        if kind == "disk":
            subprocess.run(["umount", str(tmp_path)], check=True)


# Failing stores -------------------------------------------------------------------------------------------------------


def all_operations(store: Store) -> list[Callable[[], object]]:
    stage = store.stage("stage")
    return [
        lambda: store.write_bytes("a", b"1"),
        lambda: store.create_json("a", 1),
        lambda: store.read_bytes("a"),
        lambda: store.exists("a"),
        store.list,
        lambda: store.delete_prefix("a"),
        lambda: stage.write_part(rows(1)),
        stage.published,
        stage.read,
    ]


def test_an_unreachable_endpoint_fails_inside_the_deadline(s3_uri: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "0.5")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: every connection is refused
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        store = Store(f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
        for operation in all_operations(store)[:3]:
            start = time.monotonic()
            with pytest.raises(StoreError) as caught:
                operation()
            assert time.monotonic() - start < 20  # generous, for a busy machine
            for part in (endpoint, "bucket 'vce-test'", " attempts in ", "AWS_ENDPOINT_URL_S3"):
                assert part in str(caught.value)
            assert "test-secret-key" not in str(caught.value)


def test_a_server_that_hangs_fails_inside_the_deadline(s3_uri: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store(f"s3://vce-test/run?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http")
        start = time.monotonic()
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL_S3"):
            store.read_bytes("a")
        assert time.monotonic() - start < 30


def test_a_missing_bucket_is_named_without_retries(s3_uri: Callable) -> None:
    store = Store(s3_uri("run").replace("vce-test", "vce-absent"))
    start = time.monotonic()
    for operation in all_operations(store):
        with pytest.raises(StoreError, match=r"bucket 'vce-absent'.*Check the bucket name in the URI"):
            operation()
    assert time.monotonic() - start < 30  # not the 60 s for which transient faults are retried


@pytest.mark.parametrize(
    ("status", "code", "check"),
    [
        (403, "AccessDenied", "AWS_ACCESS_KEY_ID"),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION"),
        (507, "InsufficientStorage", "free space"),
        (418, "Teapot", "the server's log"),
    ],
)
def test_permanent_errors_are_not_retried(s3_uri: Callable, status: int, code: str, check: str) -> None:
    seen: list[str] = []
    with serving(failing(status, code, seen)) as endpoint:
        store = Store(f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
        with pytest.raises(StoreError, match=rf"writing .*{endpoint}.*after 1 attempt.*Check .*{check}"):
            store.write_bytes("a", b"1")
        assert seen.count("PUT") == 1
        with pytest.raises(StoreError, match=rf"creating .*after 1 attempt.*Check .*{check}"):
            store.create_json("a", 1)
        assert seen.count("PUT") == 2


def test_throttling_is_retried_until_the_deadline(s3_uri: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "1")
    seen: list[str] = []
    with serving(failing(503, "SlowDown", seen)) as endpoint:
        store = Store(f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
        with pytest.raises(StoreError, match=r"SLOW_DOWN.*VCE_RAY_STORE_DEADLINE_S"):
            store.write_bytes("a", b"1")
    assert len(seen) >= 3


def test_a_retrying_filesystem_retries_after_pickling(s3_uri: Callable) -> None:
    seen: list[str] = []
    failures = [503] * 5

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[int, bytes]:
        seen.append(request.command)
        body_of(request)
        return (
            (failures.pop(), b"<Error><Code>SlowDown</Code><Message>no</Message></Error>") if failures else (200, b"")
        )

    with serving(answer) as endpoint:
        store = Store(f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
        copy = pickle.loads(pickle.dumps(store.retrying_filesystem()))
        with copy.open_output_stream(store.full("a")) as sink:
            sink.write(b"1")
    assert len(seen) >= 6
    assert type(Store("runs").retrying_filesystem()) is type(Store("runs").filesystem)


def test_writes_succeed_over_a_flaky_network(s3_uri: Callable) -> None:
    upstream = parse_qs(urlsplit(s3_uri("x")).query)["endpoint_override"][0]
    rng = random.Random(0)

    def flaky(request: http.server.BaseHTTPRequestHandler) -> tuple[int, bytes]:
        """Refuse some requests, execute others but lose the response, and forward the rest."""
        draw = rng.random()
        body = body_of(request)
        if draw < 0.3:
            return 503, b"<Error><Code>SlowDown</Code><Message>no</Message></Error>"
        connection = http.client.HTTPConnection(upstream)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in ("transfer-encoding", "expect")
        }
        connection.request(request.command, request.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        if request.command == "HEAD":
            content = bytes(int(response.headers.get("Content-Length") or 0))  # only the length matters
        connection.close()
        return (500, b"") if draw < 0.6 else (response.status, content)

    with serving(flaky) as endpoint:
        store = Store(f"s3://vce-test/flaky?endpoint_override={endpoint}&scheme=http")
        store.write_bytes("a", b"1")
        store.create_json("b", 1)
        store.create_json("b", 1)
        with pytest.raises(FileExistsError):
            store.create_json("b", 2)
    direct = Store(s3_uri("flaky"))
    assert direct.read_bytes("a") == b"1" and direct.read_json("b") == 1


# GCS ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"1 attempt: PERMISSION_DENIED.*Check the credentials \(GOOGLE_APPLICATION_CREDENTIALS"),
        (401, r"1 attempt: UNAUTHENTICATED.*Check the credentials \(GOOGLE_APPLICATION_CREDENTIALS"),
        (503, r"\d attempts in .* UNAVAILABLE.*Check the load and health of the server"),
        (404, r"bucket 'vce-test' does not exist at endpoint .*Check the bucket name"),
    ],
)
def test_gcs_errors_name_their_cause(monkeypatch: pytest.MonkeyPatch, status: int, message: str) -> None:
    """Both with pyarrow, which writes, and with the client that reads and creates objects."""
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "2")
    body = b'{"error": {"code": %d, "message": "no", "errors": [{"message": "no", "reason": "no"}]}}' % status

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[int, bytes]:
        body_of(request)
        return status, body

    with serving(answer) as endpoint:
        store = Store(f"gs://vce-test/x?endpoint_override={endpoint}&scheme=http")
        operations = (
            lambda: store.write_bytes("a", b"1"),
            lambda: store.read_bytes("a"),
            lambda: store.create_json("a", 1),
        )
        for operation in operations:
            with pytest.raises(StoreError, match=message):
                operation()


def test_gcs_requests_are_retried(gs_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[int, bytes]:
        if len(refused) < 3:
            refused.append(request.path)
            return 503, b"{}"
        connection = http.client.HTTPConnection(parse_qs(urlsplit(gs_uri("")).query)["endpoint_override"][0])
        connection.request(request.command, request.path, body_of(request))
        response = connection.getresponse()
        return response.status, response.read()

    with serving(answer) as endpoint:
        store = Store(f"gs://vce-test/again?endpoint_override={endpoint}&scheme=http")
        store.create_json("created.json", {"by": "us"})
        assert len(refused) == 3 and store.read_json("created.json") == {"by": "us"}
        with pytest.raises(FileExistsError):
            store.create_json("created.json", {"by": "another"})
