"""Google Cloud Storage locations and their two clients: pyarrow, and the GCS JSON API for what pyarrow cannot do.

Credentials are found by Google's own libraries: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default
login`, or the machine's service account. Over plain http, which only emulators use, requests are anonymous.
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
_STATUS_CODES = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 409: "ABORTED"}  # ABORTED: by another writer


@dataclass(frozen=True)
class GcsLocation(BucketLocation):
    """A bucket and prefix in Google Cloud Storage or an emulator of it. Holds no credentials."""

    uri_scheme = "gs"
    cloud_host = "storage.googleapis.com"
    endpoint_settings = "endpoint_override= in the URI"

    @classmethod
    def parse(cls, uri: str) -> "GcsLocation":
        """Parse `gs://bucket/prefix?endpoint_override=host:port&scheme=http`.

        Raises:
            UserError: the URI is invalid. The message never repeats the URI, which may contain a secret by mistake.
        """
        bucket, prefix, query = split_uri(
            uri, ("endpoint_override", "scheme"), "set GOOGLE_APPLICATION_CREDENTIALS, and write gs://bucket/prefix"
        )
        host, scheme = query.get("endpoint_override", ""), query.get("scheme", "https")
        if "/" in host or "@" in host or scheme not in ("http", "https") or (scheme == "http" and not host):
            raise UserError("a GCS endpoint must be endpoint_override=host:port, with scheme=http for an emulator")
        return cls(bucket, prefix, host, scheme)

    def connect(self, deadline_s: float) -> fs.GcsFileSystem:
        """Return a pyarrow filesystem whose own retries take a quarter of `deadline_s`."""
        return self.connect_retrying(deadline_s / 4)

    def connect_retrying(self, deadline_s: float) -> fs.GcsFileSystem:
        """Return a pyarrow filesystem that retries by itself until `deadline_s`, also after it was pickled."""
        return fs.GcsFileSystem(
            anonymous=self.scheme == "http",
            scheme=self.scheme,
            endpoint_override=self.host or None,
            retry_time_limit=timedelta(seconds=deadline_s),
        )

    def object_client(self, deadline_s: float) -> "GcsObjectClient":
        """Return the client for the requests that pyarrow cannot make."""
        return GcsObjectClient(self, deadline_s)


class GcsObjectClient:
    """Reads and creates whole objects with a single request each, by the JSON API; see ObjectClient.

    pyarrow looks up an object's generation first and then reads that generation, which fails if the object was replaced
    in between.
    """

    def __init__(self, location: GcsLocation, deadline_s: float):
        self._location, self._timeout_s = location, deadline_s / 4

    def get(self, path: str) -> bytes:
        """Return the content of bucket/key. Raises FileNotFoundError if the object or the bucket does not exist."""
        bucket, _, key = path.partition("/")
        response = self._request("GET", f"storage/v1/b/{bucket}/o/{quote(key, safe='')}?alt=media")
        return _raise_for_status(response, path).content

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Upload an object that must not exist yet.

        Raises:
            FileExistsError: it exists.
            FileNotFoundError: the bucket does not exist.
        """
        bucket, _, key = path.partition("/")
        query = urlencode({"uploadType": "media", "ifGenerationMatch": 0, "name": key})
        response = self._request("POST", f"upload/storage/v1/b/{bucket}/o?{query}", data)
        if response.status_code == 412:
            raise FileExistsError(errno.EEXIST, "object already exists", path)
        _raise_for_status(response, path)

    @cached_property
    def _session(self) -> "requests.Session":
        import requests
        from google.auth.transport.requests import AuthorizedSession

        return requests.Session() if self._location.scheme == "http" else AuthorizedSession(_credentials())

    def _request(self, method: str, path: str, data: bytes | None = None) -> "requests.Response":
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
    """Return this process's credentials. Cached because every stage is a store, and access tokens last an hour."""
    import google.auth

    return google.auth.default(scopes=[_SCOPE])[0]


def _raise_for_status(response: "requests.Response", path: str) -> "requests.Response":
    """Return the response if it succeeded; otherwise raise OSError with a message in pyarrow's format."""
    if response.ok:
        return response
    if response.status_code == 404:
        raise FileNotFoundError(errno.ENOENT, "object or bucket not found", path)
    transient = response.status_code in (408, 429) or response.status_code >= 500
    code = _STATUS_CODES.get(response.status_code, "UNAVAILABLE" if transient else "INVALID_ARGUMENT")
    raise OSError(f"google::cloud::Status({code}: {response.status_code} {response.reason})")
