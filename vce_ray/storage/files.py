"""Files under one prefix, on a local disk or in a bucket: atomic writes, listing, deletion, and retries.

A file is visible either complete or not at all. On a local disk it is written under a temporary name, synced and
renamed; in a bucket it appears when its upload completes.
"""

import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from pyarrow import fs

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation, ObjectClient
from vce_ray.storage.errors import Fault, StoreError, diagnose, is_unexplained
from vce_ray.storage.folder import FOLDER_INDEX, relative_path
from vce_ray.storage.gcs import GcsLocation
from vce_ray.storage.local import CHUNK_BYTES, TEMPORARY, write_local
from vce_ray.storage.local_folder import local_path
from vce_ray.storage.s3 import S3Location

T = TypeVar("T")

MANIFEST = "_manifest.json"
"""Marks a published stage. Readers of Parquet folders, such as pandas, skip names that begin with `_`."""
MANIFESTS = (MANIFEST, "manifest.json")
"""Names of a manifest: today's, and that of version 0.1.0."""


_BUCKET_TYPO = re.compile(r"(s3|gs):|(s3|gs)//", re.IGNORECASE)
"""A bucket's URI with a slash or a colon too few, which would be a folder of that name."""


class FileStore:
    """A prefix under which files are read and written, by paths relative to it.

    Args:
        uri: a local path, `file://`, `s3://bucket/prefix` with the optional query parameters `endpoint_override`,
            `scheme` and `region`, or `gs://bucket/prefix` with the first two, for an emulator. Parameters that an
            `s3://` URI lacks are taken from the environment (see env.py) and become part of `.uri`, so that workers on
            other machines reach the same place.

    Raises:
        UserError: the URI is of another kind, or contains credentials.
    """

    uri: str  # never contains credentials
    filesystem: fs.FileSystem  # for Ray and pyarrow, together with `root`
    root: str  # path of this store inside `filesystem`

    def __init__(self, uri: str | os.PathLike[str]):
        text = os.fspath(uri)
        self._deadline_s = env.STORE_DEADLINE_S.get()
        self._bucket_found = False
        self._bucket = bucket = parse_bucket_uri(text)
        if bucket is not None:
            self.uri, self.root = bucket.uri, bucket.root
            self.filesystem = self._attempt("connecting to", "", lambda: bucket.connect(self._deadline_s))
        else:
            path = text.removeprefix("file://")
            if not path or "://" in path or _BUCKET_TYPO.match(path):
                scheme = re.split("[:/]", text)[0]  # show no more of the URI: it may contain a secret
                raise UserError(
                    f"{scheme!r} is not a supported store: use a local path, s3://bucket/prefix or gs://bucket/prefix"
                )
            self.uri = self.root = str(local_path(path))
            self.filesystem = fs.LocalFileSystem()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.uri,)

    @property
    def in_bucket(self) -> bool:
        """Whether the store is in a bucket; else it is a folder of this machine, which others may not see."""
        return self._bucket is not None

    def child(self, name: str) -> Self:
        """Return the store one or more folders down. Raises UserError if `name` is empty or leaves this store."""
        path, query, rest = self.uri.partition("?") if self._bucket else (self.uri, "", "")
        return type(self)(f"{path.rstrip('/')}/{relative_path(name)}{query}{rest}")

    def where(self, path: str = "") -> str:
        """Return the full path for messages, with endpoint and bucket if the store is in one."""
        full = f"{self.root}/{path}".rstrip("/")
        return f"{full} (endpoint {self._bucket.endpoint}, bucket {self._bucket.bucket!r})" if self._bucket else full

    def full(self, path: str) -> str:
        """Return `path` inside `.filesystem`. Raises UserError if it is empty, absolute or leaves the store."""
        return f"{self.root}/{relative_path(path)}"

    def retrying_filesystem(self) -> fs.FileSystem:
        """Return a filesystem that retries by itself until the deadline, for callers that do not, such as Ray Train."""
        return self._bucket.connect_retrying(self._deadline_s) if self._bucket else self.filesystem

    # Reading and writing ----------------------------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes:
        """Return the content of a file. Raises StoreError if it does not exist or the store fails."""

        def read() -> bytes:
            if self._bucket is None:
                return Path(self.full(path)).read_bytes()
            return self._objects.get(self.full(path))

        return self.attempt("reading", path, read)

    def write_bytes(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Write a file atomically, replacing an existing one. Raises StoreError if the store fails or is full."""
        self._write("writing", path, io.BytesIO(data), len(data))

    def read_json(self, path: str) -> Any:
        """Return the value in a JSON file. Raises StoreError if the file is missing or not valid JSON."""
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self.where(path)} is corrupt: not valid JSON ({error})") from error

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as indented JSON, atomically, replacing an existing file."""
        self.write_bytes(path, to_json(value))

    def create_json(self, path: str, value: Any) -> None:
        """Write a JSON file that must not exist yet: one of several writers wins, the others get FileExistsError.

        In a bucket this uses a conditional PUT (S3's `If-None-Match: *`, GCS' `ifGenerationMatch=0`). In stores that
        ignore the condition the last writer wins.
        """
        data = to_json(value)
        try:
            self._write("creating", path, io.BytesIO(data), len(data), exclusive=True)
        except FileExistsError:
            # If the response to a successful write was lost, the retry finds our own file.
            if self.read_bytes(path) != data:
                raise

    def exists(self, path: str) -> bool:
        """Whether there is a file at `path`. Raises StoreError if the store fails."""
        return self._info(path).type == fs.FileType.File

    def list(self, path: str = "") -> list[str]:
        """Return all files below `path`, sorted, relative to this store; empty if there is no such folder."""
        folder = self.full(path) if path else self.root
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        found = self._attempt("listing", path, lambda: self.filesystem.get_file_info(selector))
        if not found:
            self._check_bucket()
        files = (info for info in found if info.type == fs.FileType.File)
        return sorted(f.path.removeprefix(f"{self.root}/") for f in files if not f.base_name.startswith(TEMPORARY))

    def delete_prefix(self, path: str) -> None:
        """Delete a file, or a folder with everything in it. Does nothing if neither exists.

        Manifests and folder indexes are deleted first, so that a deletion that is interrupted does not leave a stage or
        folder that looks complete.
        """
        full, info = self.full(path), self._info(path)
        if info.type == fs.FileType.File:
            self._delete(path, lambda: self.filesystem.delete_file(full))
        elif info.type == fs.FileType.Directory:
            for file in self.list(path):
                if file.rpartition("/")[2] in (*MANIFESTS, FOLDER_INDEX):
                    self.delete_prefix(file)
            self._delete(path, lambda: self.filesystem.delete_dir(full))

    def no_folder(self) -> str:
        """Return what to add to a message about missing data: a hint if this machine does not have a store's folder."""
        if self._bucket is not None or os.path.isdir(self.root):
            return ""
        return (
            f". {socket.gethostname()} has no folder {self.root}; on a cluster, the store must be a bucket or a folder "
            "that every node mounts at the same path"
        )

    # Retries ----------------------------------------------------------------------------------------------------------

    def attempt(self, operation: str, path: str, call: Callable[[], T]) -> T:
        """Return `call()`, retrying transient faults until the deadline.

        Raises:
            StoreError: the store failed, or `path` does not exist.
        """
        try:
            return self._attempt(operation, path, call)
        except FileNotFoundError as error:
            self._check_bucket()
            raise StoreError(f"{operation} {self.where(path)} failed: file not found{self.no_folder()}") from error

    def _attempt(self, operation: str, path: str, call: Callable[[], T]) -> T:
        """As `attempt`, but let FileNotFoundError, FileExistsError and errors other than store failures through."""
        start = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError):
                raise
            except OSError as error:
                fault = diagnose(error)
                if fault is None:
                    raise
                # Random pauses keep many workers from retrying a throttled store in step.
                pause = min(0.1 * 2**attempt, 5.0) * random.uniform(0.5, 1.0)
                elapsed = time.monotonic() - start
                if fault.transient and elapsed + pause < self._deadline_s:
                    time.sleep(pause)
                    continue
                if not fault.transient and is_unexplained(error):
                    fault = self._explain(fault)
                attempts = f"{attempt} attempts in {elapsed:.1f} s" if fault.transient else "1 attempt"
                raise StoreError(
                    f"{operation} {self.where(path)} failed after {attempts}: {fault.reason}. Check {fault.check}."
                ) from error
        raise AssertionError("unreachable")

    # Internals --------------------------------------------------------------------------------------------------------

    @cached_property
    def _objects(self) -> ObjectClient:
        assert self._bucket is not None
        return self._bucket.object_client(self._deadline_s)

    def _explain(self, fault: Fault) -> Fault:
        """Return the fault that the other client meets, which says more than pyarrow; `fault` if it meets no other."""
        try:
            self._objects.get(f"{self.root}/{TEMPORARY}absent")
        except FileNotFoundError:
            return fault
        except OSError as error:
            found = diagnose(error)
            if found and not found.transient and found.check != fault.check:
                return found
        return fault

    def _info(self, path: str) -> fs.FileInfo:
        info = self._attempt("checking", path, lambda: self.filesystem.get_file_info(self.full(path)))
        if info.type == fs.FileType.NotFound:
            self._check_bucket()
        return info

    def _check_bucket(self) -> None:
        """Raise StoreError if the bucket does not exist: pyarrow reports that like any missing file."""
        if self._bucket is None or self._bucket_found:
            return
        bucket = self._bucket
        if not self._attempt("checking the bucket of", "", lambda: bucket.bucket_exists(self.filesystem)):
            raise StoreError(
                f"bucket {bucket.bucket!r} does not exist at endpoint {bucket.endpoint}. Check the bucket name in the "
                f"URI and the endpoint ({bucket.endpoint_settings})."
            )
        self._bucket_found = True

    def _write(self, operation: str, path: str, source: BinaryIO, size: int, exclusive: bool = False) -> None:
        full = self.full(path)

        def write() -> None:
            source.seek(0)  # a retry starts over
            if self._bucket is None:
                write_local(Path(full), source, size, exclusive)
            elif exclusive:
                self._objects.put_if_absent(full, source.read())
            else:
                with self.filesystem.open_output_stream(full) as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)

        self.attempt(operation, path, write)

    def _delete(self, path: str, call: Callable[[], None]) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process deleted it first
            self._attempt("deleting", path, call)


def parse_bucket_uri(uri: str) -> BucketLocation | None:
    """Return the bucket location that a URI names, or None for other URIs. Raises UserError if it is invalid."""
    for location in (S3Location, GcsLocation):
        if uri.startswith(f"{location.uri_scheme}://"):
            return location.parse(uri)
    return None


def to_json(value: Any) -> bytes:
    """Return indented JSON. Raises TypeError or ValueError for values that JSON cannot represent, such as NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
