"""S3 locations and their two clients: pyarrow, and boto3 for what pyarrow cannot do.

Both clients send checksums with uploads. For a store too old to support them, set
AWS_REQUEST_CHECKSUM_CALCULATION=when_required in the environment of every process; both clients read it themselves.
"""

import errno
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation, split_uri

_PARAMETERS = ("endpoint_override", "scheme", "region")
_ATTEMPTS = 3  # by the client itself, within each attempt of the store
_FIRST_PAUSE_S = 0.025  # of AwsDefaultS3RetryStrategy, which doubles it each time


@dataclass(frozen=True)
class S3Location(BucketLocation):
    """A bucket and prefix at an endpoint that speaks S3. Holds no credentials."""

    region: str  # '' for the bucket's own

    uri_scheme = "s3"
    cloud_host = "s3.amazonaws.com"
    endpoint_settings = "endpoint_override= in the URI, or AWS_ENDPOINT_URL_S3"

    @classmethod
    def parse(cls, uri: str) -> "S3Location":
        """Parse `s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=...`.

        Parameters that the URI lacks are taken from the environment.

        Raises:
            UserError: the URI or a variable is invalid. The message never repeats the URI, which may contain a secret
                by mistake.
        """
        bucket, prefix, query = split_uri(
            uri,
            _PARAMETERS,
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and write s3://bucket/prefix",
        )
        endpoint = query.get("endpoint_override") or env.AWS_ENDPOINT_URL_S3.get() or env.AWS_ENDPOINT_URL.get()
        if "://" not in endpoint:
            endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
        try:
            url = urlsplit(endpoint)
        except ValueError as error:
            raise UserError(f"the S3 endpoint cannot be parsed ({error}): use host:port") from None
        host = url.netloc.rpartition("@")[2]
        if host and not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d+)?", host):
            raise UserError(
                f"{host!r} is not a host that S3 clients accept: use letters, digits, '.' and '-', and no underscore"
            )
        if "@" in url.netloc or url.path.strip("/") or url.query or url.scheme not in ("http", "https"):
            raise UserError("an S3 endpoint must be host:port or http(s)://host:port, without a user or a path")
        region = query.get("region") or env.AWS_REGION.get() or env.AWS_DEFAULT_REGION.get()
        if not region and url.netloc:
            region = "us-east-1"  # the default of S3-compatible stores other than AWS
        return cls(bucket, prefix, url.netloc, url.scheme, region)

    @property
    def query(self) -> dict[str, str]:
        """Query parameters of the URI; '' for those that are left out."""
        return super().query | {"region": self.region}

    def connect(self, deadline_s: float) -> fs.S3FileSystem:
        """Return a pyarrow filesystem whose own retries take half of `deadline_s` if the server hangs."""
        return fs.S3FileSystem(**self._options(deadline_s, fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)))

    def connect_retrying(self, deadline_s: float) -> fs.FileSystem:
        """Return a pyarrow filesystem that retries by itself until `deadline_s`, also after it was pickled."""
        return RetryingS3FileSystem(self, deadline_s)

    def object_client(self, deadline_s: float) -> "S3ObjectClient":
        """Return the client for the requests that pyarrow cannot make."""
        return S3ObjectClient(self, deadline_s)

    def _options(self, deadline_s: float, strategy: fs.S3RetryStrategy) -> dict[str, Any]:
        timeout_s = deadline_s / (2 * _ATTEMPTS)
        return {
            "endpoint_override": self.host or None,
            "scheme": self.scheme,
            "region": self.region or self._own_region(),
            "connect_timeout": min(5.0, timeout_s),
            "request_timeout": timeout_s,
            "retry_strategy": strategy,
            "allow_delayed_open": True,  # uploads a small object with one PUT
            "tls_ca_file_path": env.AWS_CA_BUNDLE.get() or None,
        }

    def _own_region(self) -> str:
        try:
            return fs.resolve_s3_region(self.bucket)
        except OSError as error:
            if "not found" in str(error):
                raise OSError(f"AWS Error NO_SUCH_BUCKET during HeadBucket operation: {error}") from error
            raise


class RetryingS3FileSystem(fs.S3FileSystem):
    """A pyarrow filesystem that retries until `deadline_s`, for callers that do not retry themselves.

    pyarrow drops the retry strategy when it pickles an S3FileSystem. This class pickles as its arguments and so keeps
    retrying in other processes.
    """

    def __init__(self, location: S3Location, deadline_s: float):
        self._arguments = location, deadline_s
        attempts = max(1, int(math.log2(deadline_s / _FIRST_PAUSE_S)))  # doubling pauses that add up to deadline_s
        super().__init__(**location._options(deadline_s, fs.AwsDefaultS3RetryStrategy(max_attempts=attempts)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class S3ObjectClient:
    """Reads and creates whole objects with a single request each, by boto3; see ObjectClient.

    pyarrow asks for an object's size first and then for that many bytes, so an object that is replaced in between is
    read as a mix of both versions.
    """

    def __init__(self, location: S3Location, deadline_s: float):
        import boto3
        from botocore.config import Config

        timeout_s = deadline_s / (2 * _ATTEMPTS)
        config = Config(
            connect_timeout=min(5.0, timeout_s),
            read_timeout=timeout_s,
            retries={"mode": "standard", "max_attempts": _ATTEMPTS - 1},
            s3={"addressing_style": "path" if location.host else "auto"},
        )
        endpoint = location.endpoint if location.host else None
        with _pyarrow_errors("CreateClient", location.root):
            self.client = boto3.client("s3", endpoint_url=endpoint, region_name=location.region or None, config=config)

    def get(self, path: str) -> bytes:
        """Return the content of bucket/key. Raises FileNotFoundError if the object or the bucket does not exist."""
        with _pyarrow_errors("GetObject", path):
            return self.client.get_object(**_bucket_and_key(path))["Body"].read()

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Upload an object that must not exist yet. Raises FileExistsError if it does."""
        with _pyarrow_errors("PutObject", path):
            self.client.put_object(**_bucket_and_key(path), Body=data, IfNoneMatch="*")


def _bucket_and_key(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def _pyarrow_errors(operation: str, path: str) -> Iterator[None]:
    """Raise boto3's errors as OSError with messages in pyarrow's format."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        response = error.response
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 412:
            raise FileExistsError(errno.EEXIST, "object already exists", path) from error
        if status == 404 and operation == "GetObject":
            raise FileNotFoundError(errno.ENOENT, "object not found", path) from error
        code = f"{response.get('Error', {}).get('Code')} (HTTP status {status})"
        raise OSError(f"AWS Error {code} during {operation} operation: {error}") from error
    except RecursionError as error:  # boto3 follows a redirect of every request without end
        raise OSError(f"AWS Error PermanentRedirect during {operation} operation: the server redirects") from error
    except (BotoCoreError, OSError) as error:  # OSError: a file with credentials or certificates cannot be read
        raise OSError(f"AWS Error {type(error).__name__} during {operation} operation: {error}") from error
