"""Where an S3 store lies, and the two clients that reach it: pyarrow, and boto3 for what pyarrow cannot do.

Both send checksums with what they write. For a store too old to know them, set
AWS_REQUEST_CHECKSUM_CALCULATION=when_required in the environment of every process: both clients read it themselves.
"""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation, split_uri

_QUERIES = ("endpoint_override", "scheme", "region")
_TRIES = 3  # by the clients themselves, within each try of ours
_FIRST_PAUSE_S = 0.025  # of AwsDefaultS3RetryStrategy, which doubles it each time


@dataclass(frozen=True)
class S3Location(BucketLocation):
    """A bucket and prefix at an endpoint that speaks S3. No credentials."""

    region: str  # '' for the bucket's own

    kind = "s3"
    cloud = "s3.amazonaws.com"
    endpoint_settings = "endpoint_override= in the URI, or AWS_ENDPOINT_URL_S3"

    @classmethod
    def parse(cls, uri: str) -> "S3Location":
        """Read `s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=...`, else the environment.

        Raises UserError, and never repeats the URI, which may hold a secret by mistake.
        """
        bucket, prefix, query = split_uri(
            uri,
            _QUERIES,
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and write s3://bucket/prefix",
        )
        endpoint = query.get("endpoint_override") or env.AWS_ENDPOINT_URL_S3.get() or env.AWS_ENDPOINT_URL.get()
        if "://" not in endpoint:
            endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
        at = urlsplit(endpoint)
        if "@" in at.netloc or at.path.strip("/") or at.query or at.scheme not in ("http", "https"):
            raise UserError("an S3 endpoint is host:port or http(s)://host:port, without a user or a path")
        region = query.get("region") or env.AWS_REGION.get() or env.AWS_DEFAULT_REGION.get()
        if not region and at.netloc:
            region = "us-east-1"  # what stores other than AWS expect where nothing is said
        return cls(bucket, prefix, at.netloc, at.scheme, region)

    @property
    def query(self) -> dict[str, str]:
        """What a URI says beside bucket and prefix; '' where there is nothing to say."""
        return super().query | {"region": self.region}

    def connect(self, deadline_s: float) -> fs.S3FileSystem:
        """pyarrow's client. Its own tries together last half of `deadline_s` where the server hangs."""
        return fs.S3FileSystem(**self._options(deadline_s, fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)))

    def connect_patiently(self, deadline_s: float) -> fs.FileSystem:
        """pyarrow's client with tries of its own that go on for `deadline_s`, wherever it is sent to."""
        return PatientS3FileSystem(self, deadline_s)

    def whole_objects(self, deadline_s: float) -> "S3Objects":
        """The client for what pyarrow cannot do."""
        return S3Objects(self, deadline_s)

    def _options(self, deadline_s: float, strategy: fs.S3RetryStrategy) -> dict[str, Any]:
        patience_s = deadline_s / (2 * _TRIES)
        return {
            "endpoint_override": self.host or None,
            "scheme": self.scheme,
            "region": self.region or self._own_region(),
            "connect_timeout": min(5.0, patience_s),
            "request_timeout": patience_s,
            "retry_strategy": strategy,
            "allow_delayed_open": True,  # a small object is one PUT
            "tls_ca_file_path": env.AWS_CA_BUNDLE.get() or None,
        }

    def _own_region(self) -> str:
        try:
            return fs.resolve_s3_region(self.bucket)
        except OSError as error:
            if "not found" in str(error):
                raise OSError(f"AWS Error NO_SUCH_BUCKET during HeadBucket operation: {error}") from error
            raise


class PatientS3FileSystem(fs.S3FileSystem):
    """pyarrow's client with tries of its own that go on for `deadline_s`, for those who try nothing again themselves.

    They do so wherever it is sent to: pyarrow's own client forgets its tries when it is pickled.
    """

    def __init__(self, location: S3Location, deadline_s: float):
        self._made_of = location, deadline_s
        doublings = max(1, int(math.log2(deadline_s / _FIRST_PAUSE_S)))  # that last as long as deadline_s
        super().__init__(**location._options(deadline_s, fs.AwsDefaultS3RetryStrategy(max_attempts=doublings)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of


class S3Objects:
    """Objects read and created with one request each, by boto3. Raises OSError worded as pyarrow words its own.

    pyarrow asks for the size first and then for so many bytes, so an object that is replaced in between comes torn.
    """

    def __init__(self, location: S3Location, deadline_s: float):
        import boto3
        from botocore.config import Config

        patience_s = deadline_s / (2 * _TRIES)
        config = Config(
            connect_timeout=min(5.0, patience_s),
            read_timeout=patience_s,
            retries={"mode": "standard", "max_attempts": _TRIES - 1},
            s3={"addressing_style": "path" if location.host else "auto"},
        )
        endpoint = location.endpoint if location.host else None
        with _worded("CreateClient", location.root):
            self.client = boto3.client("s3", endpoint_url=endpoint, region_name=location.region or None, config=config)

    def get(self, path: str) -> bytes:
        """The content of bucket/key. Raises FileNotFoundError where there is no such object, or no such bucket."""
        with _worded("GetObject", path):
            return self.client.get_object(**_address(path))["Body"].read()

    def put_if_absent(self, path: str, data: bytes) -> None:
        """PUT an object that must not exist yet. Raises FileExistsError."""
        with _worded("PutObject", path):
            self.client.put_object(**_address(path), Body=data, IfNoneMatch="*")


def _address(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def _worded(operation: str, path: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        reply = error.response
        status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 412:
            raise FileExistsError(errno.EEXIST, "the object exists", path) from error
        if status == 404 and operation == "GetObject":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", path) from error
        detail = f"{reply.get('Error', {}).get('Code')} (HTTP status {status})"
        raise OSError(f"AWS Error {detail} during {operation} operation: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"AWS Error {type(error).__name__} during {operation} operation: {error}") from error
