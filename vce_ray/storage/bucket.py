"""A store's place in a bucket: what S3 (s3.py) and Google Cloud Storage (gcs.py) have in common."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from pyarrow import fs

from vce_ray.errors import UserError


class WholeObjects(Protocol):
    """Objects read and created with one request each, which pyarrow cannot do. Raises OSError worded as pyarrow's."""

    def get(self, path: str) -> bytes:
        """The content of bucket/key. Raises FileNotFoundError where there is no such object, or no such bucket."""
        ...

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Upload an object that must not exist yet. Raises FileExistsError."""
        ...


@dataclass(frozen=True)
class BucketLocation(ABC):
    """A bucket and prefix at an endpoint. No credentials."""

    bucket: str
    prefix: str  # without slashes at its ends
    host: str  # host:port of the endpoint; '' for the cloud itself
    scheme: str  # 'http' | 'https'

    kind: ClassVar[str]  # how its URIs begin
    cloud: ClassVar[str]  # host of the cloud itself
    endpoint_settings: ClassVar[str]  # where an endpoint is set, in words

    @property
    def root(self) -> str:
        """Bucket and prefix: the path inside a pyarrow filesystem."""
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def endpoint(self) -> str:
        """The endpoint as a URL, for messages and clients."""
        return f"{self.scheme}://{self.host or self.cloud}"

    @property
    def query(self) -> dict[str, str]:
        """What a URI says beside bucket and prefix; '' where there is nothing to say."""
        return {"endpoint_override": self.host, "scheme": self.scheme if self.host else ""}

    @property
    def uri(self) -> str:
        """The whole location as a URI that pyarrow and Ray understand too."""
        query = {name: value for name, value in self.query.items() if value}
        return f"{self.kind}://{self.root}" + (f"?{urlencode(query, safe=':')}" if query else "")

    @abstractmethod
    def connect(self, deadline_s: float) -> fs.FileSystem:
        """pyarrow's client. Its own tries together last a part of `deadline_s`: the store tries again itself."""

    @abstractmethod
    def connect_patiently(self, deadline_s: float) -> fs.FileSystem:
        """pyarrow's client with tries of its own that go on for `deadline_s`, wherever it is sent to."""

    @abstractmethod
    def whole_objects(self, deadline_s: float) -> WholeObjects:
        """The client for what pyarrow cannot do."""

    def is_there(self, filesystem: fs.FileSystem) -> bool:
        """Whether there is such a bucket. Where only its objects may be seen, it is taken to be there."""
        try:
            return filesystem.get_file_info(self.bucket).type != fs.FileType.NotFound
        except OSError as error:
            if isinstance(error, PermissionError) or "ACCESS_DENIED" in str(error):
                return True
            raise


def split_uri(uri: str, queries: Sequence[str], credentials: str) -> tuple[str, str, dict[str, str]]:
    """Bucket, prefix and query of the URI of a store in a bucket.

    Args:
        queries: which the URI may hold.
        credentials: in words, where they belong.

    Raises UserError, and never repeats the URI, which may hold a secret by mistake.
    """
    url = urlsplit(uri)
    if "@" in url.netloc or ":" in url.netloc:
        raise UserError(f"a store's URI must hold no credentials: {credentials}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", url.netloc):
        raise UserError(f'{url.netloc!r} is no bucket name: 3 to 63 letters, digits, ".", "_" and "-"')
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    unknown = sorted(query.keys() - set(queries))
    if unknown or url.fragment:
        raise UserError(f"{unknown or '#'} is unknown in a store's URI: use {', '.join(queries)}")
    prefix = url.path.strip("/")
    if prefix and not all(part not in ("", ".", "..") for part in prefix.split("/")):
        raise UserError(f'{prefix!r} is no prefix of a store: leave out empty parts, "." and ".."')
    return url.netloc, prefix, query
