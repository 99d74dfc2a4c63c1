"""Bucket locations: the interface that S3 (s3.py) and Google Cloud Storage (gcs.py) implement."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from pyarrow import fs

from vce_ray.errors import UserError


class ObjectClient(Protocol):
    """Reads and creates whole objects with a single request each, which pyarrow cannot do.

    Raises OSError with messages in pyarrow's format, which `errors.diagnose` parses.
    """

    def get(self, path: str) -> bytes:
        """Return the content of bucket/key. Raises FileNotFoundError if the object or the bucket does not exist."""
        ...

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Upload an object that must not exist yet. Raises FileExistsError if it does."""
        ...


@dataclass(frozen=True)
class BucketLocation(ABC):
    """A bucket and prefix at an endpoint. Holds no credentials."""

    bucket: str
    prefix: str  # without leading or trailing slashes
    host: str  # host:port of the endpoint; '' for the cloud provider's own
    scheme: str  # 'http' | 'https'

    uri_scheme: ClassVar[str]  # 's3' | 'gs'
    cloud_host: ClassVar[str]  # host of the cloud provider's endpoint
    endpoint_settings: ClassVar[str]  # where users set the endpoint, for messages

    @property
    def root(self) -> str:
        """Bucket and prefix: the path inside a pyarrow filesystem."""
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def endpoint(self) -> str:
        """The endpoint as a URL, for messages and clients."""
        return f"{self.scheme}://{self.host or self.cloud_host}"

    @property
    def query(self) -> dict[str, str]:
        """Query parameters of the URI; '' for those that are left out."""
        return {"endpoint_override": self.host, "scheme": self.scheme if self.host else ""}

    @property
    def uri(self) -> str:
        """The complete location as a URI that pyarrow and Ray understand as well."""
        query = {name: value for name, value in self.query.items() if value}
        return f"{self.uri_scheme}://{self.root}" + (f"?{urlencode(query, safe=':')}" if query else "")

    @abstractmethod
    def connect(self, deadline_s: float) -> fs.FileSystem:
        """Return a pyarrow filesystem whose own retries take only part of `deadline_s`, since the store retries too."""

    @abstractmethod
    def connect_retrying(self, deadline_s: float) -> fs.FileSystem:
        """Return a pyarrow filesystem that retries by itself until `deadline_s`, also after it was pickled."""

    @abstractmethod
    def object_client(self, deadline_s: float) -> ObjectClient:
        """Return the client for the requests that pyarrow cannot make."""

    def bucket_exists(self, filesystem: fs.FileSystem) -> bool:
        """Whether the bucket exists. True if the credentials give access to its objects only, not to the bucket."""
        try:
            return filesystem.get_file_info(self.bucket).type != fs.FileType.NotFound
        except OSError as error:
            if isinstance(error, PermissionError) or "ACCESS_DENIED" in str(error):
                return True
            raise


def split_uri(uri: str, parameters: Sequence[str], credentials_hint: str) -> tuple[str, str, dict[str, str]]:
    """Split the URI of a store in a bucket into bucket, prefix and query.

    Args:
        parameters: the query parameters that the URI may have.
        credentials_hint: where credentials belong instead, for the message.

    Raises:
        UserError: the URI is invalid. The message never repeats the URI, which may contain a secret by mistake.
    """
    try:
        url = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"a store URI cannot be parsed ({error})") from None  # its traceback would repeat the URI
    if "@" in url.netloc or ":" in url.netloc:
        raise UserError(f"a store URI must contain no credentials: {credentials_hint}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", url.netloc):
        raise UserError(f'{url.netloc!r} is not a valid bucket name: use 3 to 63 letters, digits, ".", "_" and "-"')
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    unknown = sorted(query.keys() - set(parameters))
    if unknown or url.fragment:
        raise UserError(
            f"{', '.join(unknown) or '#'} is not supported in a store URI: use only {', '.join(parameters)}"
        )
    prefix = url.path.strip("/")
    if prefix and not all(part not in ("", ".", "..") for part in prefix.split("/")):
        raise UserError(f'{prefix!r} is not a valid store prefix: remove empty parts, "." and ".."')
    return url.netloc, prefix, query
