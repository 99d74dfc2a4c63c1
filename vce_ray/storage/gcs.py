"""Where a store in Google Cloud Storage lies, and the two clients that reach it: pyarrow, and GCS' own JSON API for
what pyarrow cannot do.

Credentials are those that Google's libraries find by themselves: GOOGLE_APPLICATION_CREDENTIALS, what `gcloud auth
application-default login` left, or the machine's service account. Over plain http, which emulators speak, none are
sent.
"""

import errno
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from pyarrow import fs

from vce_ray.errors import UserError
from vce_ray.storage.bucket import BucketLocation, split_uri

if TYPE_CHECKING:
    import requests

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_CODES = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}


@dataclass(frozen=True)
class GcsLocation(BucketLocation):
    """A bucket and prefix in Google Cloud Storage, or in an emulator of it. No credentials."""

    kind = "gs"
    cloud = "storage.googleapis.com"
    endpoint_settings = "endpoint_override= in the URI"

    @classmethod
    def parse(cls, uri: str) -> "GcsLocation":
        """Read `gs://bucket/prefix?endpoint_override=host:port&scheme=http`.

        Raises UserError, and never repeats the URI, which may hold a secret by mistake.
        """
        bucket, prefix, query = split_uri(
            uri, ("endpoint_override", "scheme"), "set GOOGLE_APPLICATION_CREDENTIALS, and write gs://bucket/prefix"
        )
        host, scheme = query.get("endpoint_override", ""), query.get("scheme", "https")
        if "/" in host or "@" in host or scheme not in ("http", "https") or (scheme == "http" and not host):
            raise UserError("a GCS endpoint is endpoint_override=host:port, with scheme=http for an emulator")
        return cls(bucket, prefix, host, scheme)

    def connect(self, deadline_s: float) -> fs.GcsFileSystem:
        """pyarrow's client. Its own tries together last a quarter of `deadline_s`."""
        return self.connect_patiently(deadline_s / 4)

    def connect_patiently(self, deadline_s: float) -> fs.GcsFileSystem:
        """pyarrow's client with tries of its own that go on for `deadline_s`, wherever it is sent to."""
        return fs.GcsFileSystem(
            anonymous=self.scheme == "http",
            scheme=self.scheme,
            endpoint_override=self.host or None,
            retry_time_limit=timedelta(seconds=deadline_s),
        )

    def whole_objects(self, deadline_s: float) -> "GcsObjects":
        """The client for what pyarrow cannot do."""
        return GcsObjects(self, deadline_s)


class GcsObjects:
    """Objects read and created with one request each. Raises OSError worded as pyarrow words its own.

    pyarrow looks an object up first and then asks for that generation of it, which is gone where it was replaced.
    """

    def __init__(self, location: GcsLocation, deadline_s: float):
        self._location, self._timeout_s = location, deadline_s / 4

    def get(self, path: str) -> bytes:
        """The content of bucket/key. Raises FileNotFoundError where there is no such object, or no such bucket."""
        bucket, _, key = path.partition("/")
        return _checked(self._ask("GET", f"storage/v1/b/{bucket}/o/{quote(key, safe='')}?alt=media"), path).content

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Upload an object that must not exist yet. Raises FileExistsError; FileNotFoundError without a bucket."""
        bucket, _, key = path.partition("/")
        query = urlencode({"uploadType": "media", "ifGenerationMatch": 0, "name": key})
        told = self._ask("POST", f"upload/storage/v1/b/{bucket}/o?{query}", data)
        if told.status_code == 412:
            raise FileExistsError(errno.EEXIST, "the object exists", path)
        _checked(told, path)

    @cached_property
    def _session(self) -> "requests.Session":
        import requests
        from google.auth.transport.requests import AuthorizedSession

        return requests.Session() if self._location.scheme == "http" else AuthorizedSession(_credentials())

    def _ask(self, method: str, path: str, data: bytes | None = None) -> "requests.Response":
        import requests
        from google.auth.exceptions import GoogleAuthError

        try:
            return self._session.request(
                method,
                f"{self._location.endpoint}/{path}",
                data=data,
                headers={"Content-Type": "application/octet-stream"},
                timeout=self._timeout_s,
            )
        except requests.RequestException as error:
            raise OSError(f"google::cloud::Status(UNAVAILABLE: {type(error).__name__}: {error})") from error
        except GoogleAuthError as error:
            raise OSError(f"google::cloud::Status(UNAUTHENTICATED: {error})") from error


@cache
def _credentials() -> Any:
    """Those of this process, looked up once: every stage is a store of its own, and their tokens last an hour."""
    import google.auth

    return google.auth.default(scopes=[_SCOPE])[0]


def _checked(told: "requests.Response", path: str) -> "requests.Response":
    """An answer that is no refusal."""
    if told.ok:
        return told
    if told.status_code == 404:
        raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", path)
    passing = told.status_code in (408, 429) or told.status_code >= 500
    code = _CODES.get(told.status_code, "UNAVAILABLE" if passing else "INVALID_ARGUMENT")
    raise OSError(f"google::cloud::Status({code}: {told.status_code} {told.reason})")
