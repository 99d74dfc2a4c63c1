"""Finding base models: folders, stores and hub ids, and the table of families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import pytest
from hub_server import HubServer, Repo

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models import folder
from vce_ray.models.base import ImageModel
from vce_ray.models.families import FAMILIES, default_sampling, family_of, reads_images
from vce_ray.models.folder import base_config, base_stamp, folder_revision, model_folder, published_name
from vce_ray.models.load import load_model
from vce_ray.storage.store import Store


def checkpoint(tmp_path: Path, model_type: str) -> str:
    """A folder with a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "dtype": "bfloat16"}))
    return str(tmp_path)


def test_every_family_has_a_class() -> None:
    for name, family in FAMILIES.items():
        model = resolve_name(family.model)
        assert family.name == name
        assert issubclass(model, ImageModel) and callable(model.from_folder)


@pytest.mark.parametrize(
    ("model_type", "captions", "sampling"),
    [
        ("janus", True, SamplingConfig()),
        ("llamagen", False, SamplingConfig(guidance_scale=7.5, top_k=1000)),
    ],
)
def test_a_config_alone_tells_the_family(
    tmp_path: Path, model_type: str, captions: bool, sampling: SamplingConfig
) -> None:
    ref = checkpoint(tmp_path, model_type)
    assert family_of(ref).name == model_type
    assert reads_images(ref) == captions
    assert default_sampling(ref) == sampling
    assert default_sampling(ref, batch_size=3).batch_size == 3


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        (EMBEDDED, (EMBEDDED, None)),
        ("owner/janus", ("owner/janus", None)),
        ("owner/janus@v1", ("owner/janus", "v1")),
        ("s3://bucket/models/janus-7b?endpoint_override=10.0.0.7:9000&scheme=http", ("janus-7b", None)),
    ],
)
def test_what_is_published_names_a_base_without_saying_where_it_is(ref: str, name: tuple[str, str | None]) -> None:
    assert published_name(ref) == name


def test_a_folder_is_published_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "janus/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "janus")
    for ref in (str(tmp_path / "janus"), ".", "inner/..", f"{tmp_path}/janus/"):
        assert published_name(ref) == ("janus", None)


def test_the_embedded_model_has_settings_of_its_own() -> None:
    assert reads_images(EMBEDDED)
    assert default_sampling(EMBEDDED) == SamplingConfig(guidance_scale=2.0, temperature=0.7)
    assert default_sampling(EMBEDDED, temperature=1.0).temperature == 1.0
    with pytest.raises(ValueError, match="temperature"):
        default_sampling(EMBEDDED, temperature=-1.0)


def test_a_stamp_names_revision_and_dtype(tmp_path: Path) -> None:
    ref = checkpoint(tmp_path, "janus")
    assert base_stamp(ref) == {"base_revision": folder_revision(tmp_path), "dtype": "bfloat16"}


def test_a_local_config_is_not_cached(tmp_path: Path) -> None:
    assert family_of(checkpoint(tmp_path, "janus")).name == "janus"
    assert family_of(checkpoint(tmp_path, "llamagen")).name == "llamagen"


def test_a_hub_config_is_downloaded_alone_and_once(hub: HubServer) -> None:
    hub.repos["owner/model"] = Repo({"config.json": b'{"model_type": "llamagen"}', "model.safetensors": b"weights"})
    hub.repos["owner/empty"] = Repo({"model.safetensors": b"weights"})
    for _ in range(2):
        assert family_of("owner/model@v1").name == "llamagen"
    assert family_of("owner/model").name == "llamagen"
    assert hub.downloads() == ["config.json"]
    with pytest.raises(ValueError, match=r"'owner/empty' has no config\.json"):
        family_of("owner/empty")


def test_a_config_in_a_store_is_read_alone(s3_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    ref = s3_uri("bases/config-only")
    monkeypatch.setattr(folder, "model_folder", lambda ref: pytest.fail("weights"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        base_config(ref)
    Store(ref).write_bytes("config.json", b'{"model_type": "janus"}')
    assert base_config(ref) == {"model_type": "janus"}
    assert reads_images(ref)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no-such-model", "unknown base model"),
        ("/tmp", "no config.json"),
        ("../nowhere", "unknown base model .* no such folder"),
    ],
)
def test_unknown_bases_are_rejected(ref: str, message: str) -> None:
    for find in (model_folder, base_config, family_of):
        with pytest.raises(ValueError, match=message):
            find(ref)


def test_a_folder_in_a_store_is_copied_once_and_again_when_it_changes(s3_uri, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VCE_RAY_MODEL_CACHE", str(tmp_path / "cache"))
    ref = s3_uri("bases/small")
    store = Store(ref)
    with pytest.raises(ValueError, match=r"no config\.json"):
        model_folder(ref)
    store.write_bytes("config.json", b'{"model_type": "janus"}')
    assert (model_folder(ref) / "config.json").exists(), "a folder without subfolders"
    store.write_bytes("text_encoder/model.safetensors", b"weights")
    folder = model_folder(ref)
    assert (folder / "text_encoder/model.safetensors").read_bytes() == b"weights"
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(ref) == folder and (folder / "config.json").stat().st_mtime_ns == stamp
    store.write_bytes("text_encoder/model.safetensors", b"other weights")
    assert (model_folder(ref) / "text_encoder/model.safetensors").read_bytes() == b"other weights"
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and no partial copy


def test_a_model_cache_that_cannot_be_used_is_named(s3_uri, tmp_path: Path, monkeypatch) -> None:
    ref = s3_uri("bases/cached")
    Store(ref).write_bytes("config.json", b'{"model_type": "janus"}')
    (tmp_path / "file").write_text("no folder")
    for cache, reason in (
        (f"{tmp_path}/file", r"file \(File exists\): set VCE_RAY_MODEL_CACHE to a folder"),
        ("/proc/cache", r"/proc/cache \(No such file or directory\): set VCE_RAY_MODEL_CACHE"),
        ("~nobody-of-this-name/cache", r"'~nobody-of-this-name/cache' cannot be resolved \(no such home folder\)"),
    ):
        monkeypatch.setenv("VCE_RAY_MODEL_CACHE", cache)
        with pytest.raises(UserError, match=reason):
            model_folder(ref)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("multi_modality", "deepseek-community/Janus-Pro-7B"), ("llama", "model_type 'llama': known are janus, llamagen")],
)
def test_checkpoints_of_other_families_are_rejected(kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))
