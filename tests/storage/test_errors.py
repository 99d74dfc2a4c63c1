"""Which failures of a store are retried, and which setting the message names for the others: over HTTP, with both
clients, pyarrow and boto3, and with real files of credentials."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from test_store import body_of, failing, run_python, serving

from vce_ray.storage.errors import diagnose
from vce_ray.storage.store import Store, StoreError

EXPIRED = "which have expired: run `aws sso login`, or set new AWS_ACCESS_KEY_ID"
LOGIN = "login of AWS_PROFILE, which has expired or is missing: run `aws sso login` or `aws login`"
CLOCK = "the clock of this machine, which differs from the server's: synchronize it"
WRONG = "which the server does not accept: correct AWS_ACCESS_KEY_ID"
MISSING = "which cannot be loaded: set AWS_ACCESS_KEY_ID"
DENIED = "permissions on the bucket"
REGION = "region= in the URI, or AWS_REGION"

REFUSALS = [
    (400, "ExpiredToken", EXPIRED),
    (400, "ExpiredTokenException", EXPIRED),
    (400, "TokenRefreshRequired", EXPIRED),
    (403, "RequestTimeTooSkewed", CLOCK),
    (403, "RequestExpired", CLOCK),
    (403, "InvalidAccessKeyId", WRONG),
    (403, "InvalidClientTokenId", WRONG),
    (403, "UnrecognizedClientException", WRONG),
    (403, "SignatureDoesNotMatch", WRONG),
    (400, "InvalidToken", WRONG),
    (403, "InvalidSecurity", WRONG),
    (403, "MissingAuthenticationToken", MISSING),
    (400, "MissingSecurityHeader", MISSING),
    (403, "AccessDenied", DENIED),
    (403, "AllAccessDisabled", DENIED),
    (403, "AccountProblem", DENIED),
    (403, "NotSignedUp", DENIED),
    (401, "Unauthorized", DENIED),
    (400, "AuthorizationHeaderMalformed", REGION),
    (400, "IllegalLocationConstraintException", REGION),
    (301, "PermanentRedirect", REGION),
]
"""Permanent errors of S3, with what the message names."""


@pytest.mark.parametrize(("status", "code", "check"), REFUSALS, ids=[code for _, code, _ in REFUSALS])
def test_a_refusal_names_its_cause_whichever_request_meets_it(
    s3_uri: Callable, status: int, code: str, check: str
) -> None:
    """Also if the response has no body, as to HEAD, and whatever words the server's text contains."""
    text = "connection timeout; the token or signature of the region is a credential"
    seen: list[str] = []
    with serving(failing(status, code, seen, text)) as endpoint:
        store = Store(f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
        for operation in (
            lambda: store.exists("a"),
            lambda: store.write_bytes("a", b"1"),
            lambda: store.read_bytes("a"),
            lambda: store.create_json("a", 1),
            store.list,
            lambda: store.delete_prefix("a"),
            lambda: store.stage("stage").read_part("part-0.parquet"),
        ):
            with pytest.raises(StoreError, match="after 1 attempt: ") as caught:
                operation()
            checked = str(caught.value).rpartition(". Check ")[2]
            assert check in checked, f"{caught.value}"
            assert "\n" not in str(caught.value)


SSO = """
[profile dev]
sso_session = corp
sso_account_id = 111122223333
sso_role_name = role
[sso-session corp]
sso_region = us-east-1
sso_start_url = https://corp.awsapps.com/start
sso_registration_scopes = sso:account:access
"""
OLD_SSO = """
[profile dev]
sso_start_url = https://corp.awsapps.com/start
sso_region = us-east-1
sso_account_id = 111122223333
sso_role_name = role
"""
ASSUMED = "[profile dev]\nrole_arn = arn:aws:iam::111122223333:role/x\nsource_profile = absent\n"
ROLE = {"AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/x", "AWS_WEB_IDENTITY_TOKEN_FILE": "/absent/token"}
DEV = {"AWS_PROFILE": "dev"}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("environment", "config", "token_of", "named", "check"),
    [
        pytest.param({}, "", None, "Unable to locate credentials", MISSING, id="none"),
        pytest.param(DEV, "", None, "profile (dev) could not be found", MISSING, id="no profile"),
        pytest.param({"AWS_ACCESS_KEY_ID": "A"}, "", None, "missing: AWS_SECRET_ACCESS_KEY", MISSING, id="partial"),
        pytest.param(DEV, "[profile dev\n", None, "Unable to parse config file: ", MISSING, id="broken file"),
        pytest.param(DEV, ASSUMED, None, '"absent" referenced in the profile "dev"', MISSING, id="no source"),
        pytest.param(ROLE, "", None, "'/absent/token'", MISSING, id="no token file"),
        pytest.param(DEV, "[profile dev]\ncredential_process = /bin/false\n", None, "process", MISSING, id="process"),
        pytest.param(DEV, SSO, None, "Token for corp does not exist", LOGIN, id="no login"),
        pytest.param(DEV, SSO, "corp", "Token has expired and refresh failed", LOGIN, id="expired login"),
        pytest.param(DEV, OLD_SSO, "https://corp.awsapps.com/start", "has expired", LOGIN, id="expired old login"),
    ],
)
def test_credentials_that_cannot_be_loaded_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    config: str,
    token_of: str | None,
    named: str,
    check: str,
) -> None:
    """pyarrow goes on without credentials then, and the server denies access."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    cache = tmp_path / ".aws/sso/cache"
    cache.mkdir(parents=True)
    (tmp_path / ".aws/config").write_text(config)
    if token_of is not None:
        token = {"startUrl": token_of, "region": "us-east-1", "accessToken": "t", "expiresAt": "2020-01-01T00:00:00Z"}
        (cache / f"{hashlib.sha1(token_of.encode()).hexdigest()}.json").write_text(json.dumps(token))
    common = {"HOME": str(tmp_path), "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**common, **environment}.items():
        monkeypatch.setenv(name, value)
    code = """
import os, sys
from vce_ray.storage.store import Store, StoreError
store = Store(sys.argv[1])
for operation in (lambda: store.exists('a'), lambda: store.write_bytes('a', b'1'), lambda: store.create_json('a', 1)):
    try:
        operation()
    except StoreError as error:
        print(error, flush=True)
os._exit(0)  # without pyarrow's own end, which hangs if the token file is missing
"""
    with serving(failing(403, "AccessDenied", [])) as endpoint:
        done = run_python(code, f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    for line in lines:
        assert named in line and check in line.rpartition(". Check ")[2], line


def refusing_once(
    upstream: str, status: int, body: bytes, refused: list[str]
) -> Callable[[http.server.BaseHTTPRequestHandler], tuple[int, bytes]]:
    """Return an `answer` that refuses the first request that writes, and forwards all others to another server."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[int, bytes]:
        sent = body_of(request)
        if request.command in ("PUT", "POST") and not refused:
            refused.append(request.command)
            return status, body
        hop_by_hop = ("transfer-encoding", "expect", "host")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in hop_by_hop}
        connection = http.client.HTTPConnection(upstream)
        connection.request(request.command, request.path, sent, headers)
        response = connection.getresponse()
        return response.status, response.read()

    return answer


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_on_s3_is_retried(s3_uri: Callable, code: str) -> None:
    """What S3 answers while another request for the same object is in progress."""
    upstream = parse_qs(urlsplit(s3_uri("")).query)["endpoint_override"][0]
    body = f"<Error><Code>{code}</Code><Message>try again</Message></Error>".encode()
    direct = Store(s3_uri(f"conflict-{code}"))
    for number, write in enumerate((Store.create_json, Store.write_json)):
        refused: list[str] = []
        with serving(refusing_once(upstream, 409, body, refused)) as endpoint:
            store = Store(f"s3://vce-test/conflict-{code}?endpoint_override={endpoint}&scheme=http")
            write(store, f"{number}.json", {"by": "us"})
        assert refused == ["PUT"] and direct.read_json(f"{number}.json") == {"by": "us"}


def test_a_conflict_that_lasts_is_given_up(s3_uri: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "1")
    seen: list[str] = []
    with serving(failing(409, "ConditionalRequestConflict", seen)) as endpoint:
        store = Store(f"s3://vce-test/run?endpoint_override={endpoint}&scheme=http")
        with pytest.raises(StoreError, match=r"\d attempts.*no other process keeps writing this file"):
            store.create_json("a", 1)
    assert len(seen) > 1


@pytest.mark.parametrize("status", [408, 409, 429, 503])
def test_a_conflict_or_overload_on_gcs_is_retried(gs_uri: Callable, status: int) -> None:
    upstream = parse_qs(urlsplit(gs_uri("")).query)["endpoint_override"][0]
    refused: list[str] = []
    with serving(refusing_once(upstream, status, b"{}", refused)) as endpoint:
        store = Store(f"gs://vce-test/conflict-{status}?endpoint_override={endpoint}&scheme=http")
        store.create_json("created.json", {"by": "us"})
    assert refused == ["POST"] and Store(gs_uri(f"conflict-{status}")).read_json("created.json") == {"by": "us"}


def test_conflicts_that_pyarrow_reports_are_transient() -> None:
    """In its own words for codes that it does not know, and for those of GCS."""
    unknown = (
        "AWS Error UNKNOWN (HTTP status 409) during PutObject operation: Unable to parse ExceptionName: {} Message: x"
    )
    for code, transient in (("OperationAborted", True), ("InvalidBucketState", False)):
        fault = diagnose(OSError(unknown.format(code)))
        assert fault is not None and fault.transient == transient
    fault = diagnose(OSError("google::cloud::Status(ABORTED: conflict error_info={})"))
    assert fault is not None and fault.transient
