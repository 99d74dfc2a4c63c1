"""Checks the store: endpoint and clock, or the free space of a local disk; then everything that a run does in it.

Writes under a random name, `doctor-<hex>`, and deletes that again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from vce_ray import env
from vce_ray.cli.doctor.check import Asked, Check
from vce_ray.errors import UserError
from vce_ray.models.stored import free_space
from vce_ray.storage.bucket import BucketLocation
from vce_ray.storage.files import parse_bucket_uri
from vce_ray.storage.s3 import S3Location
from vce_ray.storage.store import Store, StoreError

LARGE_BYTES = 12 << 20  # pyarrow uploads files of more than 10 MiB in parts
CLOCK_LIMIT_S = 300.0  # stores reject signatures that are 15 minutes off
_PERMISSIONS = {"list": "s3:ListBucket", "read": "s3:GetObject", "delete": "s3:DeleteObject"}  # else s3:PutObject
_CONDITIONAL_FIX = (
    "use a store that supports If-None-Match: * (locally, a disk that supports hard links), or never start the same "
    "run twice at once"
)
_UNREACHABLE = (  # (exception, finding, fix); first match wins
    (socket.gaierror, "unknown host", "correct the host in {endpoint}"),
    (ConnectionRefusedError, "connection refused", "start the store, or correct the host and port in {endpoint}"),
    (ssl.SSLError, "TLS failed", "set scheme=http in --store for plain HTTP, or AWS_CA_BUNDLE for a private CA"),
    (FileNotFoundError, "CA certificates not found", "set AWS_CA_BUNDLE to a file of CA certificates, or unset it"),
    (Exception, "no response", "make sure that it is reachable from here (firewall, VPN), or correct {endpoint}"),
)


def check(asked: Asked) -> list[Check]:
    """Check the store."""
    return check_store(asked.store)


def check_store(uri: str) -> list[Check]:
    """Check a bucket's endpoint and clock, or the free space of a local disk; then everything a run does in a store."""
    try:
        location = parse_bucket_uri(uri)
        if location is None:
            return [check_free_space(Path(Store(uri).root)), *check_operations(uri)]
        first = check_endpoint(location)
        # Without a response from the endpoint every operation would fail the same way, after a minute of retries.
        return [first, *check_operations(uri)] if first.name == "clock" else [first]
    except UserError as error:  # its message never contains the URI, which may hold a secret
        return [Check("store", False, str(error), "correct --store, or the environment variable named here")]


def check_endpoint(location: BucketLocation, timeout_s: float = 5.0) -> Check:
    """Compare an endpoint's clock with ours. Returns a check named 'clock', or 'endpoint' if it does not respond."""
    url = urlsplit(location.endpoint)
    try:
        if url.scheme == "https":
            ca_bundle = env.AWS_CA_BUNDLE.get() if isinstance(location, S3Location) else ""
            context = ssl.create_default_context(cafile=ca_bundle or None)
            connection = http.client.HTTPSConnection(url.netloc, timeout=timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(url.netloc, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("HEAD", f"/{location.bucket}")  # unsigned: an error response has a Date header too
            date = connection.getresponse().getheader("Date")
    except (OSError, http.client.HTTPException) as error:
        if not location.host:  # a closed network may reach the cloud provider by other addresses than this one
            return Check("clock", True, f"not compared: no response from {location.endpoint}")
        found, fix = next(texts for kind, *texts in _UNREACHABLE if isinstance(error, kind))
        fix = fix.format(endpoint=f"the endpoint ({location.endpoint_settings})")
        return Check("endpoint", False, f"{location.endpoint}: {found} ({error})", fix)
    if date is None:
        return Check("clock", True, f"not compared: {location.endpoint} sends no Date header")
    ahead_s = time.time() - parsedate_to_datetime(date).timestamp()
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the clock of {location.endpoint}"
    fix = "set the clock that is wrong (here: timedatectl set-ntp true); signatures 15 minutes off are rejected"
    return Check("clock", True, found) if abs(ahead_s) < CLOCK_LIMIT_S else Check("clock", False, found, fix)


def check_free_space(folder: Path, needed: float = 1e9) -> Check:
    """Check that the disk of a folder, which need not exist yet, has `needed` bytes free."""
    free = free_space(folder)
    fix = f"free up {needed / 1e9:.1f} GB, or use a --store on another disk" if free < needed else ""
    return Check("disk", free >= needed, f"{free / 1e9:.1f} GB free on the disk of {folder}", fix)


def check_operations(uri: str) -> list[Check]:
    """List, write (single and multipart), read, create and delete files. Raises UserError if the URI is invalid."""
    name, data, task = f"doctor-{uuid4().hex}", os.urandom(LARGE_BYTES), "list"
    started = time.monotonic()
    others = []
    try:
        store = Store(uri)
        store.list(name)
        task = "read"  # before writing anything, because files that cannot be read could not be deleted either
        store.exists(f"{name}/small")
        with _cleanup(store, name):
            task = "write"
            store.write_bytes(f"{name}/small", b"content")
            store.write_bytes(f"{name}/large", data)
            task = "read"
            if store.read_bytes(f"{name}/large") != data:
                raise StoreError(f"{store.where(name)} reads back different data than was written")
            others.append(_check_conditional_put(store, f"{name}/once.json"))
            task = "delete"
            store.delete_prefix(name)
    except StoreError as error:
        return [store_failure("store", error, task), *others]
    done = f"listed, written (single and multipart), read and deleted in {time.monotonic() - started:.1f} s"
    return [Check("store", True, f"{store.where()}: {done}"), *others]


def _check_conditional_put(store: Store, path: str) -> Check:
    try:
        store.create_json(path, "first")
        store.create_json(path, "second")
    except FileExistsError:
        return Check("conditional put", True, "a second writer is rejected")
    except StoreError as error:
        failure = store_failure("conditional put", error, "create")
        unsupported = re.search(r"status 501|not permitted|not supported", failure.found)
        return replace(failure, fix=_CONDITIONAL_FIX) if unsupported else failure
    return Check("conditional put", False, "a second writer is not rejected", _CONDITIONAL_FIX)


def store_failure(name: str, error: Exception, task: str) -> Check:
    """Return a failed check for a store error, whose message ends with the fix if the store knows one.

    Args:
        task: what was tried: 'list', 'read', 'write', 'create' or 'delete'.
    """
    found, fix = " ".join(str(error).split()), ""
    if match := re.fullmatch(r"(.*)\. ((?:Check|Free) .*)\.", found):
        found, fix = match[1].rstrip("."), match[2][0].lower() + match[2][1:]
    if re.search(r"AWS Error (ACCESS_DENIED|AccessDenied)\b|: Access Denied", found):
        found = ("the bucket is read-only: " if task == "write" else "") + found
        permission = _PERMISSIONS.get(task, "s3:PutObject")
        fix = f"grant these credentials {permission} on the bucket, or use others (AWS_ACCESS_KEY_ID etc.)"
    return Check(name, False, found, fix or "look for a cache or proxy in between, and read the server's log")


@contextlib.contextmanager
def _cleanup(store: Store, name: str) -> Iterator[None]:
    """Delete everything below `name` on exit, and the folders of a local store that did not exist before."""
    root = Path(store.root)
    new = [] if store.in_bucket else [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    try:
        yield
    finally:
        # A failure here has the same cause as the one that is reported already.
        with contextlib.suppress(StoreError, OSError):
            store.delete_prefix(name)
            for folder in new:
                folder.rmdir()
