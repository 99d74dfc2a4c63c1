"""The doctor against real faults: each is told from the others, and told how to mend; nothing is left behind."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import boto3
import pytest

from vce_ray.cli import doctor
from vce_ray.cli.doctor import Check, check_endpoint, check_store
from vce_ray.sampling.plan import SHAPES, fitting_batch
from vce_ray.storage.s3 import S3Location
from vce_ray.storage.store import Store

HUSH = "secret-of-the-test"


@pytest.fixture
def endpoint(s3_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """host:port of the S3 server. What fails is not tried again for long, and each user is a new one to boto3."""
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "2")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return parse_qs(urlsplit(s3_uri("x")).query)["endpoint_override"][0]


@pytest.fixture
def become(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the S3 server check keys, signatures and rights. Gives a function that makes this process a user of it."""

    def check_rights(on: bool) -> None:
        free = b"0" if on else b"inf"  # requests that are let through unchecked
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"http://{endpoint}/moto-api/reset-auth", free, headers)).close()

    def user(*rights: str, key: str = "", secret: str = "") -> None:
        check_rights(False)
        iam = boto3.client("iam", endpoint_url=f"http://{endpoint}", region_name="us-east-1")
        name = f"user-{uuid4().hex}"
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": rights, "Resource": "*"}]}
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=json.dumps(policy))
        made = iam.create_access_key(UserName=name)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key or made["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret or made["SecretAccessKey"])
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        check_rights(True)

    yield user
    check_rights(False)


@contextmanager
def passed_on(real: str, drop: str = "", clock_s: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """A server that passes requests on; gives its host:port and what it was asked.

    drop: a request header that it leaves out.
    clock_s: how far its clock is ahead.
    """
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + clock_s)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def handle_any(self) -> None:
            asked.append(f"{self.command} {self.path}")
            onward = http.client.HTTPConnection(real)
            left_out = ("transfer-encoding", "expect", drop.lower())
            headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
            onward.request(self.command, self.path, self.body(), headers)
            answer = onward.getresponse()
            content = answer.read()
            onward.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("date", "server", "connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def uri(endpoint: str, scheme: str = "http", bucket: str = "vce-test") -> str:
    return f"s3://{bucket}/doctor-test?endpoint_override={endpoint}&scheme={scheme}"


def the_fault(checks: list[Check]) -> Check:
    """The one check that failed; every check is one line without a secret."""
    for check in checks:
        assert "\n" not in check.line and HUSH not in check.line
        assert check.ok != check.line.startswith("MEND ")
    (fault,) = [check for check in checks if not check.ok]
    assert fault.mend and fault.line.endswith(f". Mend: {fault.mend}")
    return fault


# The store ------------------------------------------------------------------------------------------------------------


def test_a_fit_store_passes_and_is_left_as_it_was(store_uri: str, tmp_path: Path) -> None:
    checks = check_store(store_uri)
    first = "clock" if "://" in store_uri else "disk"
    assert [(check.name, check.ok, check.mend) for check in checks] == [
        (first, True, ""),
        ("store", True, ""),
        ("conditional put", True, ""),
    ]
    assert checks[1].line.startswith("ok    store            ")
    assert Store(store_uri).list() == [] and list(tmp_path.iterdir()) == []


def test_a_local_folder_that_is_there_stays(tmp_path: Path) -> None:
    assert all(check.ok for check in check_store(str(tmp_path)))
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


def test_a_store_that_lets_a_second_writer_through(endpoint: str) -> None:
    with passed_on(endpoint, drop="If-None-Match") as (careless, asked):
        fault = the_fault(check_store(uri(careless)))
    assert (fault.name, fault.found) == ("conditional put", "a second writer is let through")
    assert fault.mend.startswith("use a store that honours If-None-Match: *")
    assert len([line for line in asked if line.startswith("PUT") and "partNumber=" in line]) > 1  # really in parts
    assert Store(uri(endpoint)).list() == []


@pytest.mark.parametrize(("clock_s", "told"), [(3600.0, "behind"), (-3600.0, "ahead of")])
def test_a_clock_that_is_off(endpoint: str, clock_s: float, told: str) -> None:
    with passed_on(endpoint, clock_s=clock_s) as (late, _):
        fault = the_fault([check_endpoint(S3Location.parse(uri(late)))])
    found = re.fullmatch(rf"(\d+) s {told} the clock of http://{late}", fault.found)
    assert fault.name == "clock" and found and abs(int(found[1]) - 3600) < 10
    assert fault.mend.startswith("set the clock that is wrong") and "15 minutes" in fault.mend


def test_an_endpoint_where_nothing_listens(endpoint: str, free_port: Callable[[], int]) -> None:
    fault = the_fault(check_store(uri(f"127.0.0.1:{free_port()}")))
    assert fault.name == "endpoint" and "nothing listens there" in fault.found
    assert fault.mend.startswith("start the store, or correct host and port in the endpoint (endpoint_override=")


def test_an_endpoint_whose_name_is_unknown(endpoint: str) -> None:
    fault = the_fault(check_store(uri("no-such-host.invalid:9000")))
    assert fault.name == "endpoint" and "no host of that name" in fault.found
    assert fault.mend.startswith("correct the host in the endpoint") and "AWS_ENDPOINT_URL_S3" in fault.mend


def test_an_endpoint_that_speaks_no_tls(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    fault = the_fault(check_store(uri(endpoint, scheme="https")))
    assert fault.name == "endpoint" and "TLS fails" in fault.found
    assert fault.mend.startswith("set scheme=http in --store")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "AWS_CA_BUNDLE" in the_fault(check_store(uri(endpoint, scheme="https"))).mend


def test_an_endpoint_that_does_not_answer(endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = S3Location.parse(uri(f"127.0.0.1:{mute.getsockname()[1]}"))
        fault = the_fault([check_endpoint(place, timeout_s=0.2)])
    assert fault.name == "endpoint" and "no answer" in fault.found and "firewall" in fault.mend


def test_a_bucket_that_is_missing(endpoint: str) -> None:
    fault = the_fault(check_store(uri(endpoint, bucket="vce-absent")))
    assert fault.name == "store" and "there is no bucket" in fault.found and "'vce-absent'" in fault.found
    assert fault.mend.startswith("check its name in the URI, and that it was made at this endpoint")


@pytest.mark.parametrize(
    ("mistake", "code"),
    [({"key": "AKIANOBODY"}, "INVALID_ACCESS_KEY_ID"), ({"secret": HUSH}, "SIGNATURE_DOES_NOT_MATCH")],
)
def test_credentials_that_are_wrong(endpoint: str, become: Callable, mistake: dict[str, str], code: str) -> None:
    become("s3:*", **mistake)
    fault = the_fault(check_store(uri(endpoint)))
    assert fault.name == "store" and fault.found.startswith("listing") and code in fault.found
    assert fault.mend.startswith("check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(
    ("rights", "told", "wanted"),
    [
        ("GetBucketAcl", "listing", "s3:ListBucket"),
        ("ListBucket GetObject", "the bucket is read-only: writing", "s3:PutObject"),
        ("ListBucket PutObject DeleteObject", "looking for", "s3:GetObject"),
        ("ListBucket PutObject GetObject", "deleting", "s3:DeleteObject"),
    ],
)
def test_credentials_that_lack_a_right(endpoint: str, become: Callable, rights: str, told: str, wanted: str) -> None:
    become(*(f"s3:{right}" for right in rights.split()))
    fault = the_fault(check_store(uri(endpoint)))
    assert fault.name == "store" and fault.found.startswith(told)
    assert fault.mend == f"allow these credentials {wanted} there, or give others (AWS_ACCESS_KEY_ID and its kin)"
    become("s3:*")
    store = Store(uri(endpoint))
    left = store.list()
    assert bool(left) == (wanted == "s3:DeleteObject")  # else all was deleted, although the check failed
    for name in left:
        store.delete_prefix(name)


def test_four_rights_are_enough(endpoint: str, become: Callable) -> None:
    become("s3:ListBucket", "s3:PutObject", "s3:GetObject", "s3:DeleteObject")
    assert all(check.ok for check in check_store(uri(endpoint)))


def test_a_local_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    fault = the_fault(check_store(str(tmp_path / "file")))
    assert fault.name == "store" and fault.found.startswith(f"writing {tmp_path}/file/doctor-")
    assert fault.mend.startswith("check the path, its owner and its permissions")
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_store_on_gcs(gs_uri: Callable[[str], str], free_port: Callable[[], int]) -> None:
    checks = check_store(gs_uri("doctor"))
    assert [(check.name, check.ok) for check in checks] == [("clock", True), ("store", True), ("conditional put", True)]
    assert not Store(gs_uri("doctor")).list()
    fault = the_fault(check_store(gs_uri("doctor").replace("gs://vce-test/", "gs://another-bucket/")))
    assert "there is no bucket for another-bucket" in fault.found
    down = f"gs://vce-test/x?endpoint_override=127.0.0.1:{free_port()}&scheme=http"
    fault = the_fault(check_store(down))
    assert fault.found.startswith("http://127.0.0.1") and "nothing listens there" in fault.found
    assert fault.mend == "start the store, or correct host and port in the endpoint (endpoint_override= in the URI)"


def test_a_disk_without_room(tmp_path: Path) -> None:
    assert doctor.check_room(tmp_path / "new" / "runs", needed=1.0).ok
    fault = the_fault([doctor.check_room(tmp_path / "new" / "runs", needed=1e18)])
    assert fault.name == "disk" and str(tmp_path) in fault.found
    assert fault.mend == "free 1000000000.0 GB there, or give a --store on another disk"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (f"azure://AKIA:{HUSH}@bucket/x", "'azure' is no kind of store"),
        (f"gs://AKIA:{HUSH}@bucket/x", "no credentials: set GOOGLE_APPLICATION_CREDENTIALS"),
        (f"s3://AKIA:{HUSH}@bucket/x", "no credentials: set AWS_ACCESS_KEY_ID"),
        (f"s3://bucket/x?secret_key={HUSH}", "['secret_key'] is unknown"),
    ],
)
def test_a_wrong_uri_is_told_without_its_secret(wrong: str, told: str) -> None:
    fault = the_fault(check_store(wrong))
    assert told in fault.found and fault.mend == "correct --store, or the variable that is named"


# The machine ----------------------------------------------------------------------------------------------------------


def test_versions_that_do_not_do() -> None:
    needs = ["torch>=2.13", "pyarrow<1", "ray[data]>=2.60", "no-such-package>=3", 'moto<1; extra == "test"']
    fault = the_fault([doctor.check_versions(needs, ">=3.11")])
    assert fault.name == "versions"
    assert fault.found == f"pyarrow {metadata.version('pyarrow')}, no-such-package missing"
    assert fault.mend == "pip install 'pyarrow<1' 'no-such-package>=3'"
    assert doctor.check_versions(needs[:1], ">=3.11").ok
    fault = the_fault([doctor.check_versions(needs[:1], "<3.0")])
    assert fault.found.startswith("Python 3.") and fault.mend == "make .venv anew with Python <3.0"


def test_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_torchvision().ok
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    fault = the_fault([doctor.check_torchvision()])
    assert fault.found == "RuntimeError: operator torchvision::nms does not exist"
    assert fault.mend.startswith("install torch and torchvision of the same release from the same place")


def test_gpus_are_named_and_none_is_no_fault() -> None:
    import torch

    check = doctor.check_gpus()
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    assert check.ok and not check.mend
    assert all(name in check.found for name in names) and (check.found == "CPU only") == (not names)


@pytest.mark.parametrize("base", ["janus-pro-7b", "deepseek-community/Janus-Pro-7B@refs/pr/1", "models/janus-pro-7b"])
def test_too_little_memory_for_a_base(base: str) -> None:
    fault = the_fault([doctor.check_memory(base, 8e9, "the GPU")])
    assert fault.found == "janus-pro-7b takes 16.54 GB for one picture, the GPU has 8.00 GB free"
    assert fault.mend == "take a smaller --base, or a device with more memory (vce-ray plan says which)"
    assert doctor.check_memory(base, 16.5e9, "the GPU").ok is False
    assert fitting_batch(SHAPES["janus-pro-7b"], 16.5e9, guided=True) == 0
    assert doctor.check_memory(base, 16.6e9, "the GPU").ok is True
    assert fitting_batch(SHAPES["janus-pro-7b"], 16.6e9, guided=True) == 1


def test_memory_for_the_embedded_base_and_for_ones_that_are_not_known() -> None:
    assert doctor.check_memory("emoji-world", 1e9, "this machine").ok
    fault = the_fault([doctor.check_memory("emoji-world", 1e6, "this machine")])
    assert fault.found.startswith("emoji-world takes 0.0") and fault.mend.startswith("take a smaller --base")
    assert doctor.check_memory("emoji-world", float("inf"), "this machine").ok
    unknown = doctor.check_memory(f"s3://AKIA:{HUSH}@bucket/x", 1.0, "this machine")
    assert unknown.ok and "not compared" in unknown.found and HUSH not in unknown.line


def test_little_shared_memory_is_a_warning() -> None:
    check = doctor.check_shared_memory(64e6)
    assert check.ok and check.line.startswith(
        "warn  shared memory    0.1 GB are free in /dev/shm. Mend: enlarge /dev/shm"
    )
    assert "docker run --shm-size=8g" in check.mend
    assert doctor.check_shared_memory(8e9).mend == ""


def test_a_cluster_that_is_not_joined(free_port: Callable[[], int]) -> None:
    mend = "set RAY_ADDRESS to host:port of the cluster's head and RAY_AUTH_TOKEN to its token, or unset RAY_ADDRESS"
    fault = the_fault([doctor.check_cluster(f"127.0.0.1:{free_port()}", timeout_s=1.0)])
    assert fault.found.startswith("127.0.0.1:") and fault.found.endswith("is not joined: no answer in 1 s")
    assert fault.mend == mend
    fault = the_fault([doctor.check_cluster(f"http://user:{HUSH}@127.0.0.1:{free_port()}", timeout_s=60.0)])
    assert "Invalid Ray address" in fault.found and fault.mend == mend


def test_a_cluster_of_other_versions() -> None:
    from ray._private.utils import check_version_info  # what Ray says when a cluster is joined

    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.12.1"}, "node 127.0.0.1")
    fault = the_fault([doctor.cluster_found("head:6379", f"RuntimeError: {mismatch.value}")])
    assert fault.found.startswith("head:6379 runs Ray 2.59.0 and Python 3.12.1, here is Ray ")
    assert fault.mend == "install ray==2.59.0 and Python 3.12.1 here, or hand the run to `ray job submit`"
    assert doctor.cluster_found("head:6379", "").ok


def test_this_machine_is_examined_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    checks = list(doctor.examine(str(tmp_path), "emoji-world"))
    names = ["disk", "store", "conditional put", "versions", "torch", "gpu", "memory", "shared memory"]
    assert [check.name for check in checks] == names[: len(checks)] and len(checks) >= 7  # macOS has no /dev/shm
    assert all(check.ok for check in checks), [check.line for check in checks]
