"""Shared fixtures: S3 and GCS servers that speak real HTTP, a store that is local in one run of a test and in a bucket
in the next, and the runs of a fleet."""

import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from tiny_runs import ENVIRONMENT, NAME, ONE, TINY, VCE_RAY

from vce_ray.storage.store import Store

if TYPE_CHECKING:
    from hub_server import HubServer

BUCKET = "vce-test"

STARTING = {"s3_uri", "gs_uri", "hub", "fleet", "finished", "local_ray", "fake_gpu"}
"""Fixtures that start servers or Ray: a test that uses one is an integration test."""

# A test run that a shell started in the background, or nohup did, ignores these, and so would the drivers it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined: without a GPU they run on the CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark integration tests by their fixtures, and group tests for two processes: one takes those that need the fleet,
    the other takes the rest, file by file."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = getattr(item, "callspec", None)
        if fixtures & STARTING or (parameters and parameters.params.get("store_uri") in ("s3", "gs")):
            item.add_marker(pytest.mark.integration)
        of_fleet = "fleet" in fixtures
        item.add_marker(pytest.mark.xdist_group("fleet" if of_fleet else str(item.path)))


@pytest.fixture(scope="session")
def s3_uri() -> Iterator[Callable[[str], str]]:
    """Start an S3 server with one bucket. Yields a function from a prefix to its `s3://` URI.

    The session's environment gets made-up credentials and loses every other AWS setting, so that child processes and
    Ray workers reach this server and nothing else.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
        yield lambda prefix: f"s3://{BUCKET}/{prefix}?endpoint_override={host}:{port}&scheme=http"
    server.stop()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that finds a free TCP port on loopback."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def gs_uri() -> Iterator[Callable[[str], str]]:
    """Start a GCS server with one bucket. Yields a function from a prefix to its `gs://` URI."""
    from gcs_server import gcs_server

    with gcs_server(BUCKET) as endpoint:
        yield lambda prefix: f"gs://{BUCKET}/{prefix}?endpoint_override={endpoint}&scheme=http"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator["HubServer"]:
    """A Hugging Face hub, which huggingface_hub in this process uses from then on, with an empty cache."""
    from hub_server import hub_server

    with hub_server(tmp_path / "hub-cache") as server:
        yield server


@pytest.fixture(params=["local", "s3", "gs"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty store: a local folder, then a prefix on S3, then one on GCS."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue(f"{request.param}_uri")(f"test-{uuid4().hex}")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """The store of an undisturbed fleet, and its output: deer, a stag, which the model draws but calls a deer, and a
    concept that does not exist."""
    place = tmp_path_factory.mktemp("fleet")
    (place / "stag.yaml").write_text("{kind: object, names: [stag], keep: [fox], labels: [stag, fox]}")
    command = [*VCE_RAY, "fleet", "deer", str(place / "stag.yaml"), "dear", "--name", "test", *TINY, *ONE]
    command += ["--track", "tensorboard"]
    ended = subprocess.run(
        [*command, "--store", str(place)], env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    return Store(place), ended.stdout


@pytest.fixture(scope="session")
def finished(fleet: tuple[Store, str]) -> Store:
    """The run of the fleet that finished, on one machine and in a folder."""
    return fleet[0].child(NAME)
