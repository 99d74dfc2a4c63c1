"""Names of captioners and refiners, and what is refused before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer, Repo

from vce_ray.config import EMBEDDED
from vce_ray.pairs.captioner import (
    CaptionerRef,
    check_captioner,
    open_captioner,
    parse_captioner,
    safe_image_captioner,
)
from vce_ray.pipeline.preflight import prepare


def test_names_are_parsed() -> None:
    assert parse_captioner(EMBEDDED) == CaptionerRef("base", EMBEDDED)
    assert parse_captioner("deepseek-community/Janus-Pro-7B@main").kind == "base"
    assert parse_captioner("s3://bucket/janus").kind == "base"
    assert parse_captioner("vllm:Qwen/Qwen2.5-VL-7B-Instruct") == CaptionerRef("vllm", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert parse_captioner("https://host:8443/v1/#a/b") == CaptionerRef("endpoint", "a/b", "https://host:8443/v1")
    for host in ("localhost:8000", "127.0.0.2", "[::1]:8000"):
        assert parse_captioner(f"http://{host}/v1#m").url == f"http://{host}/v1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vllm:", "give a folder or a hub id"),
        ("vllm:Qwen/Qwen2.5-VL@main", "without a revision"),
        ("https://host/v1", "lacks a host or a model"),
        ("https:///v1#m", "lacks a host or a model"),
        ("http://example.com/v1#m", "give https://"),
        ("http://127.0.0.1.example.com/v1#m", "give https://"),
        ("https://me:hunter2@host/v1#m", "VCE_RAY_CAPTIONER_TOKEN"),
        ("https://host/v1?key=hunter2#m", "VCE_RAY_CAPTIONER_TOKEN"),
        ("https://host:hunter2/v1#m", "invalid captioner URL"),
    ],
)
def test_invalid_names_are_refused_without_repeating_a_password(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_captioner(name)
    if "@host" in name or "?" in name:
        assert "hunter2" not in str(error.value)


def test_a_run_refuses_an_unusable_captioner_before_loading_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="give https://"):
        prepare({"concept": "deer", "store": str(tmp_path), "captioner": "http://example.com/v1#m"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[vllm\]' in a checkout"):
        prepare({"concept": "deer", "store": str(tmp_path), "captioner": "vllm:Qwen/Qwen2.5-VL-7B-Instruct"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="runs in vLLM, as its own stage"):
        open_captioner("vllm:Qwen/Qwen2.5-VL-7B-Instruct")


def test_safe_images_are_checked_by_the_captioner_or_the_base(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert safe_image_captioner("https://host/v1#m", "base") == "https://host/v1#m"
    assert safe_image_captioner("vllm:a/b", "base") == "base"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    hub.repos["a/b"] = Repo({"config.json": b"{}", "model.safetensors": b"weights"})
    assert check_captioner("vllm:a/b", EMBEDDED) == "a/b in vLLM"
    with pytest.raises(ValueError, match="a/c is neither a folder here nor a model on the hub"):
        check_captioner("vllm:a/c", EMBEDDED)
    monkeypatch.setattr("vce_ray.pairs.captioner.reads_images", lambda ref: False)
    with pytest.raises(ValueError, match="cannot describe the safe ones: serve the model"):
        check_captioner("vllm:a/b", "llamagen")


def test_an_invalid_token_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", "a\r\nX-Other: b")
    with pytest.raises(ValueError, match="contains spaces or control") as error:
        prepare({"concept": "deer", "store": str(tmp_path), "captioner": "https://host/v1#m"})
    assert "X-Other" not in str(error.value)
