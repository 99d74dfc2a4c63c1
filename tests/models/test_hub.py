"""Downloads from the hub that fail on the way. What doctor finds before is in tests/cli/test_doctor_models.py."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import HubServer, Repo

from vce_ray.errors import UserError
from vce_ray.models.folder import BASE, model_folder
from vce_ray.models.load import load_model
from vce_ray.storage.store import Store


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write files of at most so many bytes: a disk that is full, as far as it can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def janus() -> Repo:
    assert BASE.embedded
    return Repo.of(BASE.embedded)


def message(ref: str) -> str:
    """Return what fetching a model says."""
    with pytest.raises(UserError) as error:
        model_folder(ref)
    assert "\n" not in str(error.value) and str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value)


def test_a_connection_that_breaks_off(hub: HubServer, janus: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its retries
    hub.repos["o/janus"] = Repo(janus.files, cut_off=("model.safetensors",))
    assert message("o/janus") == (
        "the download of o/janus broke off (peer closed connection without sending complete message body): "
        "run the same command again"
    )
    hub.repos["o/janus"] = janus
    assert (model_folder("o/janus") / "model.safetensors").read_bytes() == janus.files["model.safetensors"]
    assert hub.downloads().count("tokenizer.json") == 1, "what was complete is not downloaded again"


def test_a_disk_that_is_full(
    hub: HubServer, janus: Repo, s3_uri: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["o/janus"] = janus
    with largest_file(1 << 20):
        assert message("o/janus").startswith(
            f"no space is left for o/janus in {tmp_path}/hub-cache: free some, or set "
        )
    monkeypatch.setenv("VCE_RAY_MODEL_CACHE", str(tmp_path / "cache"))
    ref = s3_uri("bases/full")
    for name, content in janus.files.items():
        Store(ref).write_bytes(name, content)
    with largest_file(1 << 20):
        assert message(ref).endswith("free: free some, or set VCE_RAY_MODEL_CACHE to a folder on another disk")
    assert not list((tmp_path / "cache").iterdir()), "a partial copy was left behind"


def test_a_model_that_turns_out_to_be_incomplete_is_not_loaded(hub: HubServer, janus: Repo) -> None:
    hub.repos["o/mute"] = Repo({name: content for name, content in janus.files.items() if "tokenizer" not in name})
    with pytest.raises(UserError, match=r"^base model 'o/mute' has no tokenizer"):
        load_model("o/mute")
