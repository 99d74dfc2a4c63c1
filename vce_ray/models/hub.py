"""Fetch models from the Hugging Face hub, and say in one line why one cannot be fetched and what to do.

huggingface_hub is imported on first use. It reads HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HTTPS_PROXY by
itself.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from vce_ray.errors import UserError
from vce_ray.storage.local_folder import FULL

if TYPE_CHECKING:
    import httpx


TIMEOUT_S = 10.0
"""Seconds to wait for the hub's answer about a model, after which the cache is looked at."""


class HubFile(NamedTuple):
    """A file of a model on the hub."""

    size: int
    """Bytes; 0 if the hub does not say."""
    cached: bool
    """Whether it is on this machine already."""


def hub_folder(ref: str, patterns: Sequence[str]) -> Path:
    """Return the local folder of a model on the hub, downloading what is not in the cache yet.

    Args:
        ref: 'owner/name', or 'owner/name@revision' to pin a commit, tag or branch.
        patterns: names of the files to fetch, with wildcards.

    Raises:
        UserError: the model cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    name, revision = split_id(ref)
    with _explained(ref):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def hub_text(ref: str, file: str) -> str | None:
    """Return the text of one small file of a model on the hub; None if the model has no such file.

    Raises:
        UserError: the model cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    if file not in hub_files(ref, [file]):  # also answers at once if there is no hub; the download retries for 20 s
        return None
    name, revision = split_id(ref)
    with _explained(ref):
        return Path(hf_hub_download(name, file, revision=revision)).read_text()


def hub_files(ref: str, patterns: Sequence[str]) -> dict[str, HubFile]:
    """Return the files of a model by name. Nothing is downloaded; without the hub, they are those of the cache.

    Raises:
        UserError: the model can be neither reached nor found in the cache.
    """
    import httpx
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    name, revision = split_id(ref)
    allowed = list(patterns)
    with _explained(ref):
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except RevisionNotFoundError:
            raise
        except (httpx.HTTPError, OSError) as unreachable:
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=allowed, local_files_only=True))
            except LocalEntryNotFoundError:
                raise unreachable from None
            paths = [path for path in folder.rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): HubFile(path.stat().st_size, True) for path in paths}
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return {
            file: HubFile(sizes[file], isinstance(try_to_load_from_cache(name, file, revision=info.sha), str))
            for file in filter_repo_objects(sizes, allow_patterns=allowed)
        }


def hub_cache() -> Path:
    """Return the folder that models from the hub are downloaded to."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def download_command(ref: str) -> str:
    """Return the advice to download a model, with the command that does."""
    from huggingface_hub import constants

    name, revision = split_id(ref)
    command = f"run `hf download {name}{f' --revision {revision}' if revision else ''}`"
    return f"unset HF_HUB_OFFLINE and {command}" if constants.is_offline_mode() else command


def split_id(ref: str) -> tuple[str, str | None]:
    """Split 'owner/name@revision' into the id and the revision; None if no revision is given."""
    name, _, revision = ref.partition("@")
    return name, revision or None


@contextmanager
def _explained(ref: str) -> Iterator[None]:
    """Turn what huggingface_hub raises, which fills several lines, into a UserError of one line."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError) as error:
        raise UserError(*_explain(ref, error)) from error


def _explain(ref: str, error: Exception) -> tuple[str, str]:
    """Return what an error of huggingface_hub means, and the fix."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = split_id(ref)
    hub = constants.ENDPOINT
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either": the cause is why the hub was of no help
    match error:
        case HFValidationError():
            return f"{ref!r} is not a hub id", "give a folder that exists, owner/name, or owner/name@revision"
        case GatedRepoError():
            return f"{name} is gated", (
                f"accept its licence at {hub}/{name} and set HF_TOKEN to a token of that account, or give a folder"
            )
        case RevisionNotFoundError():
            return f"{name} has no revision {revision or 'main'!r}", "give one of its branches, tags or commits"
        case RepositoryNotFoundError():
            return f"{name} is neither a folder here nor a model on the hub, or it is private", (
                f"correct the name, or set HF_TOKEN to a token that may read {hub}/{name}"
            )
        case HfHubHTTPError():
            return _answered(name, hub, error.response)
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            return f"{name} is not, or not completely, in the cache {hub_cache()}, and HF_HUB_OFFLINE is set", (
                f"{download_command(ref)}, or give a folder"
            )
        case FileMetadataError() | httpx.UnsupportedProtocol() | json.JSONDecodeError():
            return f"{hub} does not answer as a hub does", "correct HF_ENDPOINT, or unset it"
        case httpx.InvalidURL():  # its message may repeat a password
            return "HF_ENDPOINT or a proxy setting is not a URL", "correct HF_ENDPOINT, HTTP_PROXY and HTTPS_PROXY"
        case httpx.ConnectError() | httpx.ProxyError() | httpx.TimeoutException():
            return _unreachable(hub, ref, error)
        case httpx.HTTPError():
            return f"the download of {name} broke off ({_first_line(error)})", "run the same command again"
        case OSError() if error.errno in FULL:
            return f"no space is left for {name} in {hub_cache()}", "free some, or set HF_HOME to a folder elsewhere"
        case PermissionError() | OSError(errno=errno.EROFS):
            return f"{name} cannot be written to {hub_cache()} ({_first_line(error)})", (
                "set HF_HOME to a folder that you may write to"
            )
    return f"{name} cannot be fetched from {hub} ({type(error).__name__}: {_first_line(error)})", (
        "check HF_ENDPOINT and the network, or give a folder"
    )


def _answered(name: str, hub: str, response: httpx.Response) -> tuple[str, str]:
    """Explain an HTTP status that says nothing of the model itself."""
    status = f"{response.status_code} {response.reason_phrase}"
    reason = response.headers.get("X-Error-Message", "")
    if response.status_code == 401:
        return f"{hub} refuses the token ({status})", "set HF_TOKEN to a valid token, or unset it for a public model"
    if response.status_code == 403:
        return f"{hub} denies access to {name} ({reason or status})", "set HF_TOKEN to a token that may read it"
    if response.status_code == 407:
        fix = "set HTTPS_PROXY to http://user:password@host:port"
        return f"the proxy between here and {hub} asks for credentials ({status})", fix
    if response.status_code == 429:
        return f"{hub} limits the number of requests ({status})", "wait some minutes, or set HF_TOKEN"
    return f"{hub} answers {status} for {name}", "try again later, correct HF_ENDPOINT if you set it, or give a folder"


def _unreachable(hub: str, ref: str, error: Exception) -> tuple[str, str]:
    scheme = urlsplit(hub).scheme
    if (proxy := getproxies().get(scheme)) and not proxy_bypass(urlsplit(hub).hostname or ""):
        shown = urlsplit(proxy if "://" in proxy else f"//{proxy}").netloc.rpartition("@")[2]  # without credentials
        return f"{hub} is out of reach through the proxy {shown} ({_first_line(error)})", (
            f"correct {scheme.upper()}_PROXY, unset it, or add the host to NO_PROXY"
        )
    return f"{hub} is out of reach ({_first_line(error)})", (
        f"check the network, HF_ENDPOINT and {scheme.upper()}_PROXY; or {download_command(ref)} on a machine that "
        "reaches it and copy its cache, or give a folder"
    )


def _first_line(error: Exception) -> str:
    """Return the start of an error's message, without the URLs and ids that follow; its type if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    lines = (line.strip() for line in str(error).splitlines())
    line = next(filter(None, lines), type(error).__name__).partition(" (")[0]
    return re.sub(r"^\[Errno -?\d+\] ", "", line)
