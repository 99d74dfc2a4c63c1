"""Store failures: whether a retry can help, and if not, which setting to check."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple


class StoreError(RuntimeError):
    """A store operation failed, or the requested data is missing or corrupt. The message names the path and the fix."""


class Fault(NamedTuple):
    """A failure of the store itself, as opposed to a missing file or a bug."""

    transient: bool  # worth a retry
    reason: str
    check: str  # the setting to check


_AWS_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary keys, AWS_SESSION_TOKEN"
_AWS_EXPIRED = f"the credentials, which have expired: run `aws sso login`, or set new {_AWS_KEYS}"
_AWS_LOGIN = "the login of AWS_PROFILE, which has expired or is missing: run `aws sso login` or `aws login`"
_AWS_CLOCK = "the clock of this machine, which differs from the server's: synchronize it, for example with chrony"
_AWS_WRONG = f"the credentials, which the server does not accept: correct {_AWS_KEYS}, or AWS_PROFILE"
_AWS_MISSING = f"the credentials, which cannot be loaded: set {_AWS_KEYS}, or correct AWS_PROFILE and its files"
_AWS_DENIED = (
    "the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or AWS_PROFILE) and their "
    "permissions on the bucket"
)
_AWS_REGION = "the region (region= in the URI, or AWS_REGION), and scheme= in the URI if the server redirects to https"
_AWS_ENDPOINT = (
    "the endpoint (endpoint_override= in the URI, or AWS_ENDPOINT_URL_S3), that it is reachable from here, and "
    "AWS_CA_BUNDLE if its certificate is private"
)
_CONFLICT = "that no other process keeps writing this file; VCE_RAY_STORE_DEADLINE_S sets how long to retry"
_SERVER_LOAD = "the load and health of the server; VCE_RAY_STORE_DEADLINE_S sets how long to retry"
_OTHER = "the endpoint, the bucket policy and the server's log"
_AWS_FAULTS = (
    # Codes of S3 (SlowDown), of pyarrow (SLOW_DOWN) and names of boto3's exceptions, in lower case and without
    # underscores, followed by the HTTP status if it is known. First match wins: what is more specific comes first.
    ("nosuchbucket", False, "the bucket name in the URI, and that the bucket exists at this endpoint"),
    ("expiredtoken|tokenrefreshrequired", False, _AWS_EXPIRED),
    ("tokenretrieval|ssotoken|ssoerror|noauthtoken|^login", False, _AWS_LOGIN),
    ("timetooskewed|requestexpired", False, _AWS_CLOCK),
    ("accesskeyid|clienttokenid|unrecognizedclient|signature|invalidtoken|invalidsecurity", False, _AWS_WRONG),
    ("(no|partial|unknown)credential|credentialretrieval|metadataretrieval|profile|config|mfa", False, _AWS_MISSING),
    ("filenotfounderror|permissionerror|missingauthentication|missingsecurityheader", False, _AWS_MISSING),
    ("redirect|authorizationheader|illegallocation|region|http status 30[17]", False, _AWS_REGION),
    ("conditionalrequestconflict|operationaborted", True, _CONFLICT),
    ("networkconnection|timeout|connection|httpclient|protocol|sslerror|incompleteread|streaming", True, _AWS_ENDPOINT),
    ("slowdown|throttl|internal|unavailable|http status (429|50[0234])", True, _SERVER_LOAD),
    ("accessdenied|accessdisabled|accountproblem|notsignedup|http status 40[13]", False, _AWS_DENIED),
    ("http status 507", False, "the free space of the store"),
    ("", False, _OTHER),
)
_GOOGLE_CREDENTIALS = (
    "the credentials (GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or the machine's service "
    "account) and their permissions on the bucket"
)
_GOOGLE_FAULTS = (  # codes of google::cloud::Status; first match wins
    ("OAuth2|UNAUTHENTICATED|PERMISSION_DENIED", False, _GOOGLE_CREDENTIALS),
    ("^NOT_FOUND", False, "the bucket name in the URI"),
    ("CURL error|RequestException|Timeout|ConnectionError", True, "that the endpoint is reachable from here"),
    ("^(UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|UNKNOWN)", True, _SERVER_LOAD),
    ("", False, _OTHER),
)


def _local_check(number: int) -> str:
    """Return what to check on this machine after an error of the operating system."""
    if number in (errno.EACCES, errno.EPERM):
        return f"the path, its owner and its permissions (user {os.getuid()}), or use another folder"
    if number in (errno.ENOTDIR, errno.EISDIR):
        return "the path: there is a file in place of a folder, or a folder in place of a file"
    if number == errno.EROFS:
        return "how its disk is mounted, or use a folder on another disk"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the free space and the quota of its disk, or use a folder on another disk"
    return f"the path, its disk, and its permissions (user {os.getuid()})"


def is_unexplained(error: OSError) -> bool:
    """Whether pyarrow's error may hide the cause of a refusal.

    Responses to HEAD have no body and so no error code, and pyarrow goes on without credentials if it cannot load them.
    """
    return re.search(r"AWS Error ACCESS_DENIED|No response body", str(error)) is not None


def diagnose(error: OSError) -> Fault | None:
    """Classify an error of pyarrow.fs or of the local disk; None if it is not a failure of the store.

    pyarrow raises a plain OSError for everything, so the error code has to be parsed out of its message.
    """
    text = str(error)
    if match := re.search(r"AWS Error (.+?) during (.*)", text, re.DOTALL):
        named = re.search(r"ExceptionName: (\w+)", match[2])  # of a code that pyarrow does not know
        code = f"{named[1]} {match[1]}" if named else match[1]
        normalized = code.lower().replace("_", "")
        transient, check = next((t, c) for pattern, t, c in _AWS_FAULTS if re.search(pattern, normalized))
        return Fault(transient, match[0].rstrip("."), check)
    if match := re.search(r"google::cloud::Status\((.+?)(?: error_info=|\)|$)", text, re.DOTALL):
        status = match[1].replace("Permanent error, with a last message of ", "")
        transient, check = next((t, c) for pattern, t, c in _GOOGLE_FAULTS if re.search(pattern, status))
        return Fault(transient, status, check)
    if "errors when deleting objects" in text:  # pyarrow's message for a batch deletion that was refused has no code
        return Fault(False, " ".join(text.split()), _AWS_DENIED)
    if error.errno is not None:
        reason = f"{os.strerror(error.errno)} {error.filename or ''}".rstrip()
        return Fault(False, reason, _local_check(error.errno))
    return None


def disk_full(path: Path, needed: int) -> StoreError:
    """Return the error for a disk, quota or file-size limit that leaves no room for `needed` more bytes at `path`."""
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return StoreError(
        f"not enough space to write {path}: {needed:,} bytes needed, {free:,} free on its disk. Free some space, raise "
        "the quota or file-size limit, or use another disk (--store, or TMPDIR for temporary files); published data is "
        "intact, and the same command resumes from it."
    )
