"""What tests share: an S3 server that speaks real HTTP, and a store that is local in one run and on S3 in the next."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

BUCKET = "vce-test"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined: they then run on the CPU


@pytest.fixture(scope="session")
def s3_uri() -> Iterator[Callable[[str], str]]:
    """Start an S3 server with one bucket; gives a function from a prefix to its `s3://` URI.

    The session's environment gets made-up credentials and loses every other AWS setting, so that child processes and
    Ray workers reach the same server and nothing else.
    """
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
    """A function that finds a TCP port on loopback which nothing listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(params=["local", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a store: a local folder, then a prefix on S3."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_uri")(f"test-{uuid4().hex}")
