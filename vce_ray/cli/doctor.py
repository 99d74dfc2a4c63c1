"""Checks whether this machine, the store and the cluster are ready for a run, and says how to fix what is not.

    for check in run_checks('s3://bucket/runs', base):
        print(check.line)

Each check does exactly what a run does: it writes to and reads from the store, imports torchvision, joins the cluster.
It writes under a random name, `doctor-<hex>`, and deletes that again. No output contains a secret.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import platform
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation
from vce_ray.storage.files import parse_bucket_uri
from vce_ray.storage.s3 import S3Location
from vce_ray.storage.store import Store, StoreError

if TYPE_CHECKING:
    from vce_ray.sampling.memory import HostMemory

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
_JOIN = """
from vce_ray.pipeline.session import ray_session
try:
    with ray_session(): pass
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    raise SystemExit(1)
"""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    """Whether a run can work."""
    found: str
    fix: str = ""
    """What to do, in one line; empty if nothing. If `ok`, this is a warning: a run works, but more slowly."""

    @property
    def line(self) -> str:
        """The result in one line, as the command prints it."""
        state = "FIX" if not self.ok else "warn" if self.fix else "ok"
        return f"{state:<5} {self.name:<16} {self.found.rstrip('.')}" + (f". Fix: {self.fix}" if self.fix else "")


def run_checks(store: str, base: str) -> Iterator[Check]:
    """Run all checks in turn, except those that must fail because an earlier one did."""
    yield from check_store(store)
    yield check_versions(metadata.requires("vce_ray") or [], metadata.metadata("vce_ray")["Requires-Python"])
    yield (torch_check := check_torchvision())
    if torch_check.ok:
        import torch

        from vce_ray.sampling.memory import free_memory, host_memory

        yield check_gpus()
        if torch.cuda.is_available():
            yield check_memory(base, free_memory(torch.device("cuda")), "the GPU")
        else:
            yield check_host_memory(base, host_memory())
    if Path("/dev/shm").exists():  # on systems without it, Ray does not use it
        yield check_shared_memory(shutil.disk_usage("/dev/shm").free)
    if (address := os.environ.get("RAY_ADDRESS", "")) not in ("", "local"):
        yield check_cluster(address)


# The store ------------------------------------------------------------------------------------------------------------


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
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))).free
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
        return [_failure("store", error, task), *others]
    done = f"listed, written (single and multipart), read and deleted in {time.monotonic() - started:.1f} s"
    return [Check("store", True, f"{store.where()}: {done}"), *others]


def _check_conditional_put(store: Store, path: str) -> Check:
    try:
        store.create_json(path, "first")
        store.create_json(path, "second")
    except FileExistsError:
        return Check("conditional put", True, "a second writer is rejected")
    except StoreError as error:
        failure = _failure("conditional put", error, "create")
        unsupported = re.search(r"status 501|not permitted|not supported", failure.found)
        return replace(failure, fix=_CONDITIONAL_FIX) if unsupported else failure
    return Check("conditional put", False, "a second writer is not rejected", _CONDITIONAL_FIX)


def _failure(name: str, error: Exception, task: str) -> Check:
    """Return a failed check for a store error, whose message ends with the fix if the store knows one."""
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
    new = [] if "://" in store.uri else [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    try:
        yield
    finally:
        # A failure here has the same cause as the one that is reported already.
        with contextlib.suppress(StoreError, OSError):
            store.delete_prefix(name)
            for folder in new:
                folder.rmdir()


# The machine ----------------------------------------------------------------------------------------------------------


def check_versions(requirements: Iterable[str], python: str) -> Check:
    """Check Python and the installed packages against a package's requirements, without its extras."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(python).contains(platform.python_version()):
        return Check("versions", False, f"Python {platform.python_version()}", f"recreate .venv with Python {python}")
    required = [
        item for item in map(Requirement, requirements) if not item.marker or item.marker.evaluate({"extra": ""})
    ]
    wrong = {}
    for requirement in required:
        try:
            version = metadata.version(requirement.name)
            satisfied = requirement.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, satisfied = "missing", False
        if not satisfied:
            wrong[f"'{requirement}'"] = f"{requirement.name} {version}"
    if wrong:
        return Check("versions", False, ", ".join(wrong.values()), f"pip install {' '.join(wrong)}")
    return Check("versions", True, f"Python {platform.python_version()} and all {len(required)} required packages")


def check_torchvision() -> Check:
    """Check that torch and torchvision were built for each other; otherwise importing torchvision fails."""
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "install torch and torchvision of the same release from the same index, as constraints.txt does"
        return Check("torch", False, found, fix)
    return Check("torch", True, f"torch {torch.__version__} and torchvision {torchvision.__version__} are compatible")


def check_gpus() -> Check:
    """List the GPUs that torch sees. Always ok: a run works without."""
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in devices]
    return Check("gpu", True, f"{len(names)}: {', '.join(names)}" if names else "CPU only")


def check_host_memory(base: str, memory: HostMemory) -> Check:
    """Check memory on a machine without GPUs, where a container's limit may be less than the machine has."""
    if memory.limit is None:
        return check_memory(base, memory.free, "this machine")
    check = check_memory(base, memory.free, f"this container, limited to {memory.limit / 1e9:.2f} GB,")
    return check if check.ok else replace(check, fix="raise the container's memory limit, or use a smaller --base")


def check_memory(base: str, free: float, device: str) -> Check:
    """Check that a base model and one image, sampled with guidance, fit into `free` bytes.

    The needs of large models are known only for the shapes in models/shape.py; no large model is loaded to find out.
    """
    from vce_ray.config import EMBEDDED
    from vce_ray.models.load import load_model
    from vce_ray.models.shape import SHAPES
    from vce_ray.sampling.plan import needed_memory

    name = Path(base.partition("@")[0]).name.lower()  # of a hub id or a path
    if base != EMBEDDED and name not in SHAPES:
        return Check("memory", True, f"not checked: memory needs are known only for {EMBEDDED}, {', '.join(SHAPES)}")
    shape = load_model(device="cpu").shape if base == EMBEDDED else SHAPES[name]
    needed = needed_memory(shape)
    available = "has an unknown amount free" if free == float("inf") else f"has {free / 1e9:.2f} GB free"
    fix = "" if free >= needed else "use a smaller --base, or a device with more memory (see vce-ray plan)"
    found = f"{name} needs {needed / 1e9:.2f} GB for one image, {device} {available}"
    return Check("memory", free >= needed, found, fix)


def check_shared_memory(free: float, recommended: float = 2e9) -> Check:
    """Warn if /dev/shm is too small for Ray's object store, which then uses the disk."""
    fix = "enlarge /dev/shm (docker run --shm-size=8g); otherwise Ray keeps its object store on disk"
    found = f"{free / 1e9:.1f} GB free in /dev/shm"
    return Check("shared memory", True, found, fix if free < recommended else "")


def check_cluster(address: str, timeout_s: float = 20.0) -> Check:
    """Check that this machine can join the cluster at RAY_ADDRESS, which requires the same versions of Ray and Python.

    Joins in a subprocess: at an address where nothing listens, joining takes minutes and cannot be interrupted.
    """
    command, environment = [sys.executable, "-c", _JOIN], os.environ | {"RAY_ADDRESS": address}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return interpret_join(address, f"no response within {timeout_s:g} s")
    return interpret_join(address, done.stdout or f"Ray exited with {done.returncode}" if done.returncode else "")


def interpret_join(address: str, error: str) -> Check:
    """Return the check for an attempt to join a cluster; `error` is Ray's message, empty on success."""
    shown = address.rpartition("@")[2]  # without credentials
    error = " ".join(error.replace(address, shown).split())
    local = f"Ray {metadata.version('ray')} and Python {platform.python_version()}"
    if not error:
        return Check("cluster", True, f"{shown} runs {local}, as this machine does")
    if remote := re.search(r"cluster was started with: Ray: (\S+) Python: (\S+)", error):
        found = f"{shown} runs Ray {remote[1]} and Python {remote[2]}, this machine has {local}"
        fix = f"install ray=={remote[1]} and Python {remote[2]} here, or submit the run with `ray job submit`"
        return Check("cluster", False, found, fix)
    fix = "set RAY_ADDRESS to host:port of the cluster's head and RAY_AUTH_TOKEN to its token, or unset RAY_ADDRESS"
    return Check("cluster", False, f"cannot join {shown}: {error[:300]}", fix)
