"""What goes wrong with a store, told apart: does it pass by itself, and if not, which setting is to be checked."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple


class StoreError(RuntimeError):
    """A store failed, or does not hold what was asked of it. The message names the place and the mend."""


class Fault(NamedTuple):
    """A failure of the store itself."""

    passing: bool  # worth another try
    reason: str
    check: str  # the setting to look at


_CREDENTIALS = (
    "the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or AWS_PROFILE) and what the bucket "
    "allows them to do"
)
_ENDPOINT = (
    "the endpoint (endpoint_override= in the URI, or AWS_ENDPOINT_URL_S3), that it can be reached from here, and "
    "AWS_CA_BUNDLE if its certificate is a private one"
)
# Codes of pyarrow (SLOW_DOWN) and of S3 (SlowDown) in one spelling: lower case, without underscores. First match wins.
_CODES = (
    ("nosuchbucket", False, "the bucket's name in the URI, and that it was made at this endpoint"),
    ("accessdenied|accesskey|signature|token|credential|http status 40[13]", False, _CREDENTIALS),
    ("redirect|authorizationheader|http status 301", False, "the region (region= in the URI, or AWS_REGION)"),
    ("networkconnection|timeout|connection|httpclient|protocol|sslerror|incompleteread|streaming", True, _ENDPOINT),
    (
        "slowdown|throttl|internal|unavailable|http status (429|50[0234])",
        True,
        "the server's load and health; VCE_RAY_STORE_DEADLINE_S sets how long to try",
    ),
    ("http status 507", False, "the room that is left in the store"),
)
_GOOGLE_CREDENTIALS = (
    "the credentials (GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or the machine's service "
    "account) and what the bucket allows them to do"
)
_GOOGLE_CODES = (  # of google::cloud::Status; first match wins
    ("OAuth2|UNAUTHENTICATED|PERMISSION_DENIED", False, _GOOGLE_CREDENTIALS),
    ("^NOT_FOUND", False, "the bucket's name in the URI"),
    ("CURL error|RequestException|Timeout|ConnectionError", True, "that the endpoint can be reached from here"),
    (
        "^(UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|UNKNOWN)",
        True,
        "the server's load and health; VCE_RAY_STORE_DEADLINE_S sets how long to try",
    ),
    ("", False, "the endpoint, the bucket's rules and the server's log"),
)


def diagnose(error: OSError) -> Fault | None:
    """What an error of pyarrow.fs, or of the local disk, means; None if it is no fault of the store."""
    text = str(error)
    found = re.search(r"AWS Error (.+?) during (.*)", text, re.DOTALL)
    if found:
        code = f"{found[1]} {found[2]}" if "ExceptionName" in found[2] else found[1]
        spelled = code.lower().replace("_", "")
        for pattern, passing, check in _CODES:
            if re.search(pattern, spelled):
                return Fault(passing, found[0], check)
        return Fault(False, found[0], "the endpoint, the bucket's rules and the server's log")
    if found := re.search(r"google::cloud::Status\((.+?)(?: error_info=|\)|$)", text, re.DOTALL):
        told = found[1].replace("Permanent error, with a last message of ", "")
        passing, check = next((p, c) for pattern, p, c in _GOOGLE_CODES if re.search(pattern, told))
        return Fault(passing, told, check)
    if "errors when deleting objects" in text:  # pyarrow words the refusal to delete several files in its own way
        return Fault(False, " ".join(text.split()), _CREDENTIALS)
    if error.errno is not None:
        reason = f"{os.strerror(error.errno)} {error.filename or ''}".rstrip()
        return Fault(False, reason, f"the path, its owner and its permissions (user {os.getuid()})")
    return None


def disk_full(path: Path, needed: int) -> StoreError:
    """The error for a disk (or quota, or limit on file size) that cannot hold `needed` more bytes at `path`."""
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return StoreError(
        f"no room to write {path}: {needed:,} bytes are needed and {free:,} are free on its disk. Free some space, "
        "raise the quota or file-size limit, or use a store on another disk; what is published is unharmed, and the "
        "same command goes on from there."
    )
