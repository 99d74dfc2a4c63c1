"""Says whether this machine and the store are fit for a run, and how to mend what is not.

    for check in examine('s3://bucket/runs', 'emoji-world'):
        print(check.line)

A check does the very thing that a run will do: it writes and reads in the store, imports torchvision, joins the
cluster. What it writes lies below a made-up name, `doctor-<hex>`, and is deleted again. No secret is shown.
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
from urllib.parse import urlsplit
from uuid import uuid4

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation
from vce_ray.storage.s3 import S3Location
from vce_ray.storage.store import Store, StoreError, bucket_of

LARGE_BYTES = 12 << 20  # pyarrow sends what is larger than 10 MiB in parts
CLOCK_LIMIT_S = 300.0  # stores refuse signatures that are 15 minutes off
_RIGHTS = {"list": "s3:ListBucket", "read": "s3:GetObject", "delete": "s3:DeleteObject"}  # else s3:PutObject
_ONE_WRITER = "use a store that honours If-None-Match: * (a disk with hard links), or never start one run twice at once"
_UNREACHABLE = (  # first match wins
    (socket.gaierror, "no host of that name is known", "correct the host in {endpoint}"),
    (ConnectionRefusedError, "nothing listens there", "start the store, or correct host and port in {endpoint}"),
    (ssl.SSLError, "TLS fails", "set scheme=http in --store for plain HTTP, AWS_CA_BUNDLE for a private certificate"),
    (FileNotFoundError, "no certificates to trust", "name a file of certificates in AWS_CA_BUNDLE, or unset it"),
    (Exception, "no answer", "see that it can be reached from here (firewall, VPN), or correct {endpoint}"),
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
    """What one check found."""

    name: str
    ok: bool
    """Whether a run can do with it."""
    found: str
    mend: str = ""
    """What to do, in one line; empty where there is nothing to do. Where `ok`, a run goes without it, but slower."""

    @property
    def line(self) -> str:
        """The check in one line, as the command prints it."""
        state = "MEND" if not self.ok else "warn" if self.mend else "ok"
        return f"{state:<5} {self.name:<16} {self.found.rstrip('.')}" + (f". Mend: {self.mend}" if self.mend else "")


def examine(store: str, base: str) -> Iterator[Check]:
    """All checks in turn, but for those that could only fail because of what an earlier one found."""
    yield from check_store(store)
    yield check_versions(metadata.requires("vce_ray") or [], metadata.metadata("vce_ray")["Requires-Python"])
    yield (torch_works := check_torchvision())
    if torch_works.ok:
        import torch

        from vce_ray.sampling.device import free_memory

        yield check_gpus()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield check_memory(base, free_memory(device), "the GPU" if device.type == "cuda" else "this machine")
    if Path("/dev/shm").exists():  # where there is none, Ray does not look for it
        yield check_shared_memory(shutil.disk_usage("/dev/shm").free)
    if (address := os.environ.get("RAY_ADDRESS", "")) not in ("", "local"):
        yield check_cluster(address)


# The store ------------------------------------------------------------------------------------------------------------


def check_store(uri: str) -> list[Check]:
    """Endpoint and clock of a store in a bucket, or room on a local disk; then all that a run asks of a store."""
    try:
        location = bucket_of(uri)
        if location is None:
            return [check_room(Path(Store(uri).root)), *check_use(uri)]
        first = check_endpoint(location)
        # where nothing answers, every use of the store would fail alike, after a minute of tries
        return [first, *check_use(uri)] if first.name == "clock" else [first]
    except UserError as error:  # it says what is wrong, and repeats nothing that may be a secret
        return [Check("store", False, str(error), "correct --store, or the variable that is named")]


def check_endpoint(location: BucketLocation, timeout_s: float = 5.0) -> Check:
    """Whether the clock of an endpoint is ours ('clock'); where nothing answers there, what to do ('endpoint')."""
    url = urlsplit(location.endpoint)
    try:
        if url.scheme == "https":
            own = env.AWS_CA_BUNDLE.get() if isinstance(location, S3Location) else ""
            trusted = ssl.create_default_context(cafile=own or None)
            connection = http.client.HTTPSConnection(url.netloc, timeout=timeout_s, context=trusted)
        else:
            connection = http.client.HTTPConnection(url.netloc, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("HEAD", f"/{location.bucket}")  # unsigned: a refusal carries the date as well
            date = connection.getresponse().getheader("Date")
    except (OSError, http.client.HTTPException) as error:
        if not location.host:  # of a cloud, a closed network may reach other addresses than this one
            return Check("clock", True, f"not compared: {location.endpoint} does not answer")
        found, mend = next(words for kind, *words in _UNREACHABLE if isinstance(error, kind))
        mend = mend.format(endpoint=f"the endpoint ({location.endpoint_settings})")
        return Check("endpoint", False, f"{location.endpoint}: {found} ({error})", mend)
    if date is None:
        return Check("clock", True, f"not compared: {location.endpoint} does not tell the time")
    ahead_s = time.time() - parsedate_to_datetime(date).timestamp()
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the clock of {location.endpoint}"
    mend = "set the clock that is wrong (here: timedatectl set-ntp true): signatures 15 minutes off are refused"
    return Check("clock", True, found) if abs(ahead_s) < CLOCK_LIMIT_S else Check("clock", False, found, mend)


def check_room(folder: Path, needed: float = 1e9) -> Check:
    """Whether the disk of a folder, which need not be there yet, has room for a run."""
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))).free
    mend = f"free {needed / 1e9:.1f} GB there, or give a --store on another disk" if free < needed else ""
    return Check("disk", free >= needed, f"{free / 1e9:.1f} GB are free on the disk of {folder}", mend)


def check_use(uri: str) -> list[Check]:
    """Lists, writes whole and in parts, reads back, creates and deletes. Raises UserError if `uri` is no store's."""
    name, data, task = f"doctor-{uuid4().hex}", os.urandom(LARGE_BYTES), "list"
    begun = time.monotonic()
    others = []
    try:
        store = Store(uri)
        store.list(name)
        task = "read"  # refused already where there is nothing yet, and what cannot be read cannot be deleted either
        store.exists(f"{name}/small")
        with _left_as_found(store, name):
            task = "write"
            store.write_bytes(f"{name}/small", b"fit")
            store.write_bytes(f"{name}/large", data)
            task = "read"
            if store.read_bytes(f"{name}/large") != data:
                raise StoreError(f"{store.where(name)} is not read as it was written")
            others.append(_check_exclusive(store, f"{name}/once.json"))
            task = "delete"
            store.delete_prefix(name)
    except StoreError as error:
        return [_fault("store", error, task), *others]
    did = f"listed, written whole and in parts, read back and deleted in {time.monotonic() - begun:.1f} s"
    return [Check("store", True, f"{store.where()}: {did}"), *others]


def _check_exclusive(store: Store, path: str) -> Check:
    try:
        store.create_json(path, "first")
        store.create_json(path, "second")
    except FileExistsError:
        return Check("conditional put", True, "a second writer is refused")
    except StoreError as error:
        fault = _fault("conditional put", error, "create")
        unknown = re.search(r"status 501|not permitted|not supported", fault.found)
        return replace(fault, mend=_ONE_WRITER) if unknown else fault
    return Check("conditional put", False, "a second writer is let through", _ONE_WRITER)


def _fault(name: str, error: Exception, task: str) -> Check:
    """A store's error as a check. Where the store can say what to look at, that is how its message ends."""
    found, mend = " ".join(str(error).split()), ""
    if told := re.fullmatch(r"(.*)\. ((?:Check|Free) .*)\.", found):
        found, mend = told[1].rstrip("."), told[2][0].lower() + told[2][1:]
    if re.search(r"AWS Error (ACCESS_DENIED|AccessDenied)\b|: Access Denied", found):
        found = ("the bucket is read-only: " if task == "write" else "") + found
        right = _RIGHTS.get(task, "s3:PutObject")
        mend = f"allow these credentials {right} there, or give others (AWS_ACCESS_KEY_ID and its kin)"
    return Check(name, False, found, mend or "look for a cache or proxy on the way, and at the server's log")


@contextlib.contextmanager
def _left_as_found(store: Store, name: str) -> Iterator[None]:
    """Deletes what was written below `name`, whatever happens, and a local store's folder if it was not there."""
    root = Path(store.root)
    new = [] if "://" in store.uri else [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    try:
        yield
    finally:
        with contextlib.suppress(
            StoreError, OSError
        ):  # the store, or the folder's own removal: what fails now failed before, and is told
            store.delete_prefix(name)
            for folder in new:
                folder.rmdir()


# The machine ----------------------------------------------------------------------------------------------------------


def check_versions(requirements: Iterable[str], python: str) -> Check:
    """Whether Python and the packages here satisfy what a package's metadata requires, its extras left out."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(python).contains(platform.python_version()):
        return Check("versions", False, f"Python {platform.python_version()}", f"make .venv anew with Python {python}")
    needs = [need for need in map(Requirement, requirements) if not need.marker or need.marker.evaluate({"extra": ""})]
    wrong = {}
    for need in needs:
        try:
            version = metadata.version(need.name)
            fits = need.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, fits = "missing", False
        if not fits:
            wrong[f"'{need}'"] = f"{need.name} {version}"
    if wrong:
        return Check("versions", False, ", ".join(wrong.values()), f"pip install {' '.join(wrong)}")
    return Check("versions", True, f"Python {platform.python_version()}, and {len(needs)} packages as required")


def check_torchvision() -> Check:
    """Whether torch and torchvision were built for each other; where they were not, torchvision cannot be imported."""
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        mend = "install torch and torchvision of the same release from the same place, as constraints.txt does"
        return Check("torch", False, found, mend)
    return Check("torch", True, f"torch {torch.__version__} and torchvision {torchvision.__version__} fit each other")


def check_gpus() -> Check:
    """What torch sees. None is no fault."""
    import torch

    seen = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in seen]
    return Check("gpu", True, f"{len(names)}: {', '.join(names)}" if names else "CPU only")


def check_memory(base: str, free: float, where: str) -> Check:
    """Whether a base and one picture, drawn with guidance, fit into `free` bytes. Large bases are known by name."""
    from vce_ray.models.load import EMBEDDED, load_model
    from vce_ray.sampling.plan import RESERVE, SHAPES, Device, plan

    name = Path(base.partition("@")[0]).name.lower()  # of a hub id or a path
    if base != EMBEDDED and name not in SHAPES:
        return Check("memory", True, f"not compared: known are the needs of {EMBEDDED}, {', '.join(SHAPES)}")
    shape = load_model(device="cpu").shape if base == EMBEDDED else SHAPES[name]
    needed = plan(shape, Device(where, free, 1.0, 1.0), batch=1).peak_bytes / (1 - RESERVE)
    takes = f"{name} takes {needed / 1e9:.2f} GB for one picture"
    has = "does not tell what is free" if free == float("inf") else f"has {free / 1e9:.2f} GB free"
    mend = "" if free >= needed else "take a smaller --base, or a device with more memory (vce-ray plan says which)"
    return Check("memory", free >= needed, f"{takes}, {where} {has}", mend)


def check_shared_memory(free: float, wanted: float = 2e9) -> Check:
    """Whether Ray's object store, which wants 30 % of a machine's memory, finds room in /dev/shm; it does without."""
    mend = "" if free >= wanted else "enlarge /dev/shm (docker run --shm-size=8g): without, objects lie on the disk"
    return Check("shared memory", True, f"{free / 1e9:.1f} GB are free in /dev/shm", mend)


def check_cluster(address: str, timeout_s: float = 20.0) -> Check:
    """Whether the cluster that RAY_ADDRESS names can be joined, which wants the same Ray and Python on both sides."""
    # in a process of its own: joining an address where nothing listens takes minutes, and cannot be broken off
    command, to = [sys.executable, "-c", _JOIN], os.environ | {"RAY_ADDRESS": address}
    try:
        done = subprocess.run(command, env=to, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return cluster_found(address, f"no answer in {timeout_s:g} s")
    return cluster_found(address, done.stdout or f"Ray ended with {done.returncode}" if done.returncode else "")


def cluster_found(address: str, fault: str) -> Check:
    """What the attempt to join a cluster means; `fault` is Ray's message, or empty."""
    shown = address.rpartition("@")[2]
    fault = " ".join(fault.replace(address, shown).split())
    here = f"Ray {metadata.version('ray')} and Python {platform.python_version()}"
    if not fault:
        return Check("cluster", True, f"{shown} runs {here}, as this machine does")
    if there := re.search(r"cluster was started with: Ray: (\S+) Python: (\S+)", fault):
        mend = f"install ray=={there[1]} and Python {there[2]} here, or hand the run to `ray job submit`"
        return Check("cluster", False, f"{shown} runs Ray {there[1]} and Python {there[2]}, here is {here}", mend)
    mend = "set RAY_ADDRESS to host:port of the cluster's head and RAY_AUTH_TOKEN to its token, or unset RAY_ADDRESS"
    return Check("cluster", False, f"{shown} is not joined: {fault[:300]}", mend)
