"""Arguments that are rejected before anything starts. Starts no Ray."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import serve

from vce_ray import env
from vce_ray.config import SamplingConfig
from vce_ray.models.adapter import save_adapter
from vce_ray.serving.deploy import app_from_args, build_app, check_port, serve_command
from vce_ray.storage.store import Store

SAMPLING = SamplingConfig(batch_size=8)


def test_serve_rejects_an_open_host_without_a_token(monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]):
    monkeypatch.delenv(env.API_TOKEN.name, raising=False)
    with pytest.raises(ValueError, match="reachable from other machines"):
        serve_command("emoji-world", None, "0.0.0.0", free_port(), SAMPLING)
    assert not ray.is_initialized() or serve.status().applications, "nothing may have been started"


def test_ports_that_are_in_use_or_invalid() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="give another port"):
            check_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(ValueError, match="65535"):
        check_port("127.0.0.1", 70000)


def test_build_app_rejects_bad_arguments(base_model: str, adapter: Path, store_uri: str, tmp_path: Path) -> None:
    store = Store(store_uri)
    with pytest.raises(ValueError, match="unknown base model"):
        build_app("no-such-model", None, SAMPLING)
    with pytest.raises(ValueError, match="is not a vce_ray adapter"):
        build_app(base_model, str(tmp_path), SAMPLING)
    with pytest.raises(ValueError, match="max_waiting 3"):
        build_app(base_model, None, SAMPLING, max_waiting=3)

    other: Any = SimpleNamespace(revision="0123456789abcdef")
    save_adapter(tmp_path / "other", {"x": torch.zeros(1)}, other, None, {})
    store.upload(tmp_path / "other", "adapter")
    remote = store.child("adapter").uri
    for place in (str(tmp_path / "other"), remote if "://" in remote else f"file://{remote}"):
        with pytest.raises(ValueError, match=r"base revision 0123456789abcdef, .* is [0-9a-f]{16}"):
            build_app(base_model, place, SAMPLING)
    build_app(base_model, str(adapter), SAMPLING)


def test_a_serve_config_file_needs_a_token_and_known_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VCE_RAY_API_TOKEN", raising=False)
    with pytest.raises(ValueError, match="VCE_RAY_API_TOKEN is not set"):
        app_from_args({"base": "emoji-world"})
    monkeypatch.setenv("VCE_RAY_API_TOKEN", "0123456789abcdef")
    with pytest.raises(ValueError, match="num_replica"):
        app_from_args({"num_replica": 2})
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        app_from_args({"kv_cache_dtype": "fp4"})
    app_from_args({"base": "emoji-world", "num_replicas": 2, "kv_cache_dtype": "fp8"})
