"""The store checks of vce-ray doctor against real failures: each comes with its fix, and no files are left behind."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import boto3
import pytest

from vce_ray.cli.doctor import Check
from vce_ray.cli.doctor.store import check_endpoint, check_free_space, check_store
from vce_ray.storage.s3 import S3Location
from vce_ray.storage.store import Store

SECRET = "secret-of-the-test"


@pytest.fixture
def endpoint(s3_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """host:port of the S3 server, with a short retry deadline and without boto3's cached credentials."""
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "2")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return parse_qs(urlsplit(s3_uri("x")).query)["endpoint_override"][0]


@pytest.fixture
def act_as(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that creates a user with given permissions on the S3 server and makes this process that user.

    From then on the server checks keys, signatures and permissions.
    """

    def enforce_permissions(on: bool) -> None:
        unchecked = b"0" if on else b"inf"  # number of requests to accept without checks
        url, headers = f"http://{endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, unchecked, headers)).close()

    def user(*permissions: str, key: str = "", secret: str = "") -> None:
        enforce_permissions(False)
        iam = boto3.client("iam", endpoint_url=f"http://{endpoint}", region_name="us-east-1")
        name = f"user-{uuid4().hex}"
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": permissions, "Resource": "*"}]}
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="permissions", PolicyDocument=json.dumps(policy))
        created = iam.create_access_key(UserName=name)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key or created["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret or created["SecretAccessKey"])
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        enforce_permissions(True)

    yield user
    enforce_permissions(False)


@contextmanager
def proxy(upstream: str, drop: str = "", clock_s: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """Run a proxy in front of a server; yield its host:port and the list of requests it received.

    Args:
        drop: a request header that it removes.
        clock_s: seconds by which its clock is ahead.
    """
    requests: list[str] = []

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
            requests.append(f"{self.command} {self.path}")
            connection = http.client.HTTPConnection(upstream)
            removed = ("transfer-encoding", "expect", drop.lower())
            headers = {name: value for name, value in self.headers.items() if name.lower() not in removed}
            connection.request(self.command, self.path, self.body(), headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("date", "server", "connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()
    thread.join()


def uri(endpoint: str, scheme: str = "http", bucket: str = "vce-test") -> str:
    return f"s3://{bucket}/doctor-test?endpoint_override={endpoint}&scheme={scheme}"


def only_failure(checks: list[Check]) -> Check:
    """Return the one check that failed. Every check must print as a single line without secrets."""
    for check in checks:
        assert "\n" not in check.line and SECRET not in check.line
        assert check.ok != check.line.startswith("FIX ")
    (failure,) = [check for check in checks if not check.ok]
    assert failure.fix and failure.line.endswith(f". Fix: {failure.fix}")
    return failure


def test_a_working_store_passes_and_stays_unchanged(store_uri: str, tmp_path: Path) -> None:
    checks = check_store(store_uri)
    first = "clock" if "://" in store_uri else "disk"
    assert [(check.name, check.ok, check.fix) for check in checks] == [
        (first, True, ""),
        ("store", True, ""),
        ("conditional put", True, ""),
    ]
    assert checks[1].line.startswith("ok    store            ")
    assert Store(store_uri).list() == [] and list(tmp_path.iterdir()) == []


def test_an_existing_local_folder_is_kept(tmp_path: Path) -> None:
    assert all(check.ok for check in check_store(str(tmp_path)))
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


def test_a_store_without_conditional_puts(endpoint: str) -> None:
    with proxy(endpoint, drop="If-None-Match") as (unconditional, requests):
        failure = only_failure(check_store(uri(unconditional)))
    assert (failure.name, failure.found) == ("conditional put", "a second writer is not rejected")
    assert failure.fix.startswith("use a store that supports If-None-Match: *")
    parts = [line for line in requests if line.startswith("PUT") and "partNumber=" in line]
    assert len(parts) > 1, "the large file is not a multipart upload"
    assert Store(uri(endpoint)).list() == []


@pytest.mark.parametrize(("clock_s", "direction"), [(3600.0, "behind"), (-3600.0, "ahead of")])
def test_a_wrong_clock(endpoint: str, clock_s: float, direction: str) -> None:
    with proxy(endpoint, clock_s=clock_s) as (shifted, _):
        failure = only_failure([check_endpoint(S3Location.parse(uri(shifted)))])
    found = re.fullmatch(rf"(\d+) s {direction} the clock of http://{shifted}", failure.found)
    assert failure.name == "clock" and found and abs(int(found[1]) - 3600) < 10
    assert failure.fix.startswith("set the clock that is wrong") and "15 minutes" in failure.fix


def test_an_endpoint_that_refuses_connections(endpoint: str, free_port: Callable[[], int]) -> None:
    failure = only_failure(check_store(uri(f"127.0.0.1:{free_port()}")))
    assert failure.name == "endpoint" and "connection refused" in failure.found
    assert failure.fix.startswith("start the store, or correct the host and port in the endpoint (endpoint_override=")


def test_an_unknown_endpoint_host(endpoint: str) -> None:
    failure = only_failure(check_store(uri("no-such-host.invalid:9000")))
    assert failure.name == "endpoint" and "unknown host" in failure.found
    assert failure.fix.startswith("correct the host in the endpoint") and "AWS_ENDPOINT_URL_S3" in failure.fix


def test_an_endpoint_without_tls(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    failure = only_failure(check_store(uri(endpoint, scheme="https")))
    assert failure.name == "endpoint" and "TLS failed" in failure.found
    assert failure.fix.startswith("set scheme=http in --store")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "AWS_CA_BUNDLE" in only_failure(check_store(uri(endpoint, scheme="https"))).fix


def test_an_endpoint_that_does_not_respond(endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        location = S3Location.parse(uri(f"127.0.0.1:{silent.getsockname()[1]}"))
        failure = only_failure([check_endpoint(location, timeout_s=0.2)])
    assert failure.name == "endpoint" and "no response" in failure.found and "firewall" in failure.fix


def test_a_missing_bucket(endpoint: str) -> None:
    failure = only_failure(check_store(uri(endpoint, bucket="vce-absent")))
    assert failure.name == "store" and "bucket 'vce-absent' does not exist at endpoint" in failure.found
    assert failure.fix.startswith("check the bucket name in the URI and the endpoint (")


@pytest.mark.parametrize(
    ("mistake", "code"),
    [({"key": "AKIANOBODY"}, "INVALID_ACCESS_KEY_ID"), ({"secret": SECRET}, "SIGNATURE_DOES_NOT_MATCH")],
)
def test_invalid_credentials(endpoint: str, act_as: Callable, mistake: dict[str, str], code: str) -> None:
    act_as("s3:*", **mistake)
    failure = only_failure(check_store(uri(endpoint)))
    assert failure.name == "store" and failure.found.startswith("listing") and code in failure.found
    assert failure.fix.startswith("check the credentials, which the server does not accept: correct AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize(
    ("granted", "found", "missing"),
    [
        ("GetBucketAcl", "listing", "s3:ListBucket"),
        ("ListBucket GetObject", "the bucket is read-only: writing", "s3:PutObject"),
        ("ListBucket PutObject DeleteObject", "checking", "s3:GetObject"),
        ("ListBucket PutObject GetObject", "deleting", "s3:DeleteObject"),
    ],
)
def test_credentials_without_a_permission(
    endpoint: str, act_as: Callable, granted: str, found: str, missing: str
) -> None:
    act_as(*(f"s3:{name}" for name in granted.split()))
    failure = only_failure(check_store(uri(endpoint)))
    assert failure.name == "store" and failure.found.startswith(found)
    assert failure.fix == f"grant these credentials {missing} on the bucket, or use others (AWS_ACCESS_KEY_ID etc.)"
    act_as("s3:*")
    store = Store(uri(endpoint))
    leftover = store.list()
    assert bool(leftover) == (missing == "s3:DeleteObject")  # otherwise everything was deleted despite the failure
    for name in leftover:
        store.delete_prefix(name)


def test_four_permissions_are_enough(endpoint: str, act_as: Callable) -> None:
    act_as("s3:ListBucket", "s3:PutObject", "s3:GetObject", "s3:DeleteObject")
    assert all(check.ok for check in check_store(uri(endpoint)))


def test_an_unwritable_local_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    failure = only_failure(check_store(str(tmp_path / "file")))
    assert failure.name == "store" and failure.found.startswith(f"writing {tmp_path}/file/doctor-")
    assert failure.fix.startswith("check the path: there is a file in place of a folder")
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_store_on_gcs(gs_uri: Callable[[str], str], free_port: Callable[[], int]) -> None:
    checks = check_store(gs_uri("doctor"))
    assert [(check.name, check.ok) for check in checks] == [("clock", True), ("store", True), ("conditional put", True)]
    assert not Store(gs_uri("doctor")).list()
    failure = only_failure(check_store(gs_uri("doctor").replace("gs://vce-test/", "gs://another-bucket/")))
    assert "bucket 'another-bucket' does not exist" in failure.found
    down = f"gs://vce-test/x?endpoint_override=127.0.0.1:{free_port()}&scheme=http"
    failure = only_failure(check_store(down))
    assert failure.found.startswith("http://127.0.0.1") and "connection refused" in failure.found
    assert (
        failure.fix == "start the store, or correct the host and port in the endpoint (endpoint_override= in the URI)"
    )


def test_a_full_disk(tmp_path: Path) -> None:
    assert check_free_space(tmp_path / "new" / "runs", needed=1.0).ok
    failure = only_failure([check_free_space(tmp_path / "new" / "runs", needed=1e18)])
    assert failure.name == "disk" and str(tmp_path) in failure.found
    assert failure.fix == "free up 1000000000.0 GB, or use a --store on another disk"


@pytest.mark.parametrize(
    ("invalid", "found"),
    [
        (f"azure://AKIA:{SECRET}@bucket/x", "'azure' is not a supported store"),
        (f"gs://AKIA:{SECRET}@bucket/x", "no credentials: set GOOGLE_APPLICATION_CREDENTIALS"),
        (f"s3://AKIA:{SECRET}@bucket/x", "no credentials: set AWS_ACCESS_KEY_ID"),
        (f"s3://bucket/x?secret_key={SECRET}", "secret_key is not supported"),
    ],
)
def test_an_invalid_uri_is_reported_without_its_secret(invalid: str, found: str) -> None:
    failure = only_failure(check_store(invalid))
    assert found in failure.found and failure.fix == "correct --store, or the environment variable named here"
