"""One place for everything a run makes: a `Store`, which is a prefix on a local disk or in a bucket of S3 or GCS.

    store = Store('s3://bucket/runs?endpoint_override=localhost:9000&scheme=http')     # or Store('runs')
    store.write_json('deer/run.json', {'concept': 'deer'})
    stage = store.stage('deer/pairs')                                                  # see stage.py

A file is there whole or not at all: locally it is written aside, synced and renamed; in a bucket it appears when its
upload ends. Faults that pass (network, throttling, 5xx) are tried again until `VCE_RAY_STORE_DEADLINE_S` has gone by.
Credentials come from where pyarrow, boto3 and Google's libraries look for them and are never part of a URI. A store
knows nothing of Ray; it pickles as its URI, and Ray takes `store.root` and `store.filesystem` wherever it wants them.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

from pyarrow import fs

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation, WholeObjects
from vce_ray.storage.errors import StoreError, diagnose
from vce_ray.storage.gcs import GcsLocation
from vce_ray.storage.local import CHUNK_BYTES, TEMPORARY, replace_folder, write_local
from vce_ray.storage.s3 import S3Location
from vce_ray.storage.stage import MANIFEST, Stage

T = TypeVar("T")

FOLDER_INDEX = "_files.json"  # the last file of an uploaded folder

__all__ = ["Stage", "Store", "StoreError"]


class Store:
    """A prefix in which files are read and written, by paths relative to it.

    uri: a local path, `file://`, or `s3://bucket/prefix` with the optional queries `endpoint_override`, `scheme` and
    `region`; what the query leaves out comes from the environment (see env.py) and becomes part of `.uri`, so that a
    worker on another machine reaches the same place. `gs://bucket/prefix` takes the first two, for an emulator.
    Raises UserError for any other URI, and for credentials in it.
    """

    uri: str  # never holds credentials
    filesystem: fs.FileSystem  # for Ray and pyarrow, with `root` in place of a scheme
    root: str  # this store's path inside `filesystem`

    def __init__(self, uri: str | os.PathLike[str]):
        text = os.fspath(uri)
        self._deadline_s = env.STORE_DEADLINE_S.get()
        self._bucket_seen = False
        self._bucket = bucket = bucket_of(text)
        if bucket is not None:
            self.uri, self.root = bucket.uri, bucket.root
            self.filesystem = self._attempt("connecting to", "", lambda: bucket.connect(self._deadline_s))
        else:
            path = text.removeprefix("file://")
            if not path or "://" in path:
                kind = text.partition("://")[0]  # no more of it is shown: it may hold a secret
                raise UserError(
                    f"{kind!r} is no kind of store: give a local path, s3://bucket/prefix or gs://bucket/prefix"
                )
            self.uri = self.root = str(Path(path).expanduser().absolute())
            self.filesystem = fs.LocalFileSystem()

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    def child(self, name: str) -> "Store":
        """The store one or more folders down. Raises UserError if `name` is empty or leads out of this store."""
        path, query, rest = self.uri.partition("?") if self._bucket else (self.uri, "", "")
        return Store(f"{path.rstrip('/')}/{_clean(name)}{query}{rest}")

    def stage(self, name: str) -> Stage:
        """The stage of that name: a folder of Parquet parts that a manifest publishes."""
        return Stage(self.child(name))

    def where(self, path: str = "") -> str:
        """`path` in words for messages: the full path, and endpoint and bucket where it is in one."""
        full = f"{self.root}/{path}".rstrip("/")
        return f"{full} (endpoint {self._bucket.endpoint}, bucket {self._bucket.bucket!r})" if self._bucket else full

    def patient_filesystem(self) -> fs.FileSystem:
        """A `filesystem` for those who try nothing again themselves, as Ray Train: it tries until the deadline."""
        return self._bucket.connect_patiently(self._deadline_s) if self._bucket else self.filesystem

    # Files ------------------------------------------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes:
        """The content of a file. Raises StoreError if there is none or the store fails."""

        def read() -> bytes:
            if self._bucket is None:
                return Path(self.full(path)).read_bytes()
            return self._objects.get(self.full(path))

        return self.attempt("reading", path, read)

    def write_bytes(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Write a file whole, in place of any that was there. Raises StoreError if the store fails or is full."""
        self._write("writing", path, io.BytesIO(data), len(data))

    def read_json(self, path: str) -> Any:
        """A JSON file's value. Raises StoreError if the file is missing or is not JSON."""
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self.where(path)} is damaged: it is not JSON ({error})") from error

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as indented JSON, whole, in place of any that was there."""
        self.write_bytes(path, to_json(value))

    def create_json(self, path: str, value: Any) -> None:
        """Write a JSON file that must not be there yet: of several writers one wins, FileExistsError for the others.

        In a bucket this takes a conditional PUT (S3's `If-None-Match: *`, GCS' `ifGenerationMatch=0`); stores that
        ignore it let the last writer win.
        """
        data = to_json(value)
        try:
            self._write("creating", path, io.BytesIO(data), len(data), exclusive=True)
        except FileExistsError:
            # A reply may be lost and the write tried again: then the file that stands in the way is our own.
            if self.read_bytes(path) != data:
                raise

    def exists(self, path: str) -> bool:
        """Whether there is a file at `path`. Raises StoreError if that cannot be known."""
        return self._info(path).type == fs.FileType.File

    def list(self, path: str = "") -> list[str]:
        """All files below `path`, sorted, relative to this store; none if there is no such folder."""
        folder = self.full(path) if path else self.root
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        found = self._attempt("listing", path, lambda: self.filesystem.get_file_info(selector))
        if not found:
            self._check_bucket()
        files = (info for info in found if info.type == fs.FileType.File)
        return sorted(f.path.removeprefix(f"{self.root}/") for f in files if not f.base_name.startswith(TEMPORARY))

    def delete_prefix(self, path: str) -> None:
        """Delete a file or a folder with all it holds; manifests go first. Nothing there is no error."""
        full, info = self.full(path), self._info(path)
        if info.type == fs.FileType.File:
            self._delete(path, lambda: self.filesystem.delete_file(full))
        elif info.type == fs.FileType.Directory:
            for file in self.list(path):
                if file.endswith((f"/{MANIFEST}", f"/{FOLDER_INDEX}")):
                    self.delete_prefix(file)
            self._delete(path, lambda: self.filesystem.delete_dir(full))

    # Folders ----------------------------------------------------------------------------------------------------------

    def upload(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Copy a folder into the store, in place of any that was there; its index is written last.

        Until then `fetch` refuses the folder. Raises UserError if `local_dir` is not a folder or has no files.
        """
        local = Path(local_dir)
        files = sorted(str(file.relative_to(local)) for file in local.rglob("*") if file.is_file())
        if not files:
            raise ValueError(f"{local} holds no files to upload: give a folder that does")
        self.delete_prefix(f"{path}/{FOLDER_INDEX}")
        for name in files:
            with open(local / name, "rb") as source:
                self._write("uploading", f"{path}/{name}", source, (local / name).stat().st_size)
        for stray in set(self.list(path)) - {f"{_clean(path)}/{name}" for name in files}:
            self.delete_prefix(stray)
        self.write_json(f"{path}/{FOLDER_INDEX}", {"files": {name: _digest(local / name) for name in files}})

    def fetch(self, path: str, local_dir: str | os.PathLike[str]) -> Path:
        """Copy an uploaded folder to `local_dir`, which appears whole, in place of any that was there.

        Raises StoreError if the folder was not uploaded to its end, or if a file is missing or damaged.
        """
        target = Path(local_dir).absolute()
        index = f"{path}/{FOLDER_INDEX}"
        if not self.exists(index):
            raise StoreError(f"{self.where(path)} is missing or its upload did not end: upload the folder again")
        aside = target.with_name(f"{TEMPORARY}{uuid4().hex}")
        try:
            for name, digest in self.read_json(index)["files"].items():
                file = aside / _clean(name)
                self.attempt("fetching", f"{path}/{name}", lambda name=name, file=file: self._fetch(path, name, file))
                if _digest(file) != digest:
                    raise StoreError(f"{self.where(f'{path}/{name}')} is damaged: upload the folder again")
            replace_folder(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    # Within -----------------------------------------------------------------------------------------------------------

    def full(self, path: str) -> str:
        """`path` inside `.filesystem`. Raises UserError if it is empty, absolute or leads out of the store."""
        return f"{self.root}/{_clean(path)}"

    def attempt(self, operation: str, path: str, call: Callable[[], T]) -> T:
        """`call()`, tried again after faults that pass. Raises StoreError, also where `path` is missing."""
        try:
            return self._attempt(operation, path, call)
        except FileNotFoundError as error:
            self._check_bucket()
            raise StoreError(f"{operation} {self.where(path)} failed: there is no such file") from error

    def _attempt(self, operation: str, path: str, call: Callable[[], T]) -> T:
        """As `attempt`, but FileNotFoundError, FileExistsError and what is no fault of the store come through."""
        start = time.monotonic()
        for number in itertools.count(1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError):
                raise
            except OSError as error:
                fault = diagnose(error)
                if fault is None:
                    raise
                pause = min(0.1 * 2**number, 5.0) * random.uniform(0.5, 1.0)
                elapsed = time.monotonic() - start
                if fault.passing and elapsed + pause < self._deadline_s:
                    time.sleep(pause)
                    continue
                tries = f"{number} tries in {elapsed:.1f} s" if fault.passing else "one try"
                raise StoreError(
                    f"{operation} {self.where(path)} failed after {tries}: {fault.reason}. Check {fault.check}."
                ) from error
        raise AssertionError("unreachable")

    @cached_property
    def _objects(self) -> WholeObjects:
        assert self._bucket is not None
        return self._bucket.whole_objects(self._deadline_s)

    def _info(self, path: str) -> fs.FileInfo:
        info = self._attempt("looking for", path, lambda: self.filesystem.get_file_info(self.full(path)))
        if info.type == fs.FileType.NotFound:
            self._check_bucket()
        return info

    def _check_bucket(self) -> None:
        """Raise StoreError if the bucket is not there: pyarrow reports that as any file that is missing."""
        if self._bucket is None or self._bucket_seen:
            return
        bucket = self._bucket
        if not self._attempt("looking for the bucket of", "", lambda: bucket.is_there(self.filesystem)):
            raise StoreError(
                f"there is no bucket for {self.where()}. Check its name in the URI, and that it was made at this "
                f"endpoint ({bucket.endpoint_settings})."
            )
        self._bucket_seen = True

    def _write(self, operation: str, path: str, source: BinaryIO, size: int, exclusive: bool = False) -> None:
        full = self.full(path)

        def write() -> None:
            source.seek(0)
            if self._bucket is None:
                write_local(Path(full), source, size, exclusive)
            elif exclusive:
                self._objects.put_if_absent(full, source.read())
            else:
                with self.filesystem.open_output_stream(full) as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)

        self.attempt(operation, path, write)

    def _delete(self, path: str, call: Callable[[], None]) -> None:
        with contextlib.suppress(FileNotFoundError):  # another deleted it first
            self._attempt("deleting", path, call)

    def _fetch(self, path: str, name: str, file: Path) -> None:
        with self.filesystem.open_input_file(self.full(f"{path}/{name}")) as source:
            write_local(file, source, source.size())


def bucket_of(uri: str) -> BucketLocation | None:
    """The place in a bucket that a URI leads to; None for any other. Raises UserError where it is not to be read."""
    for location in (S3Location, GcsLocation):
        if uri.startswith(f"{location.kind}://"):
            return location.parse(uri)
    return None


def to_json(value: Any) -> bytes:
    """Indented JSON. Raises TypeError or ValueError for what JSON cannot hold, NaN included."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _clean(path: str) -> str:
    """`path` without slashes at its ends. Raises UserError if it is empty, absolute or leads upwards."""
    clean = path.rstrip("/")
    if not all(part not in ("", ".", "..") for part in clean.split("/")):
        raise UserError(f'{path!r} is no path inside a store: use one like "pairs/part.parquet", without "." or ".."')
    return clean
