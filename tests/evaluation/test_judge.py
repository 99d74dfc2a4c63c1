"""Finding the judge: in folders, on a hub and in a store; what it weighs for a run; and that it may not change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, Repo
from safetensors.torch import load_file

from vce_ray.config import DEFAULT_CLIP, EMBEDDED, EvalConfig
from vce_ray.evaluation.clip_model import ClipModel
from vce_ray.evaluation.judge import JUDGE, check_judge, judge_folder, judge_revision
from vce_ray.storage.store import Store

SAFETENSORS, PICKLE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded judge."""
    assert JUDGE.embedded
    return Path(shutil.copytree(JUDGE.embedded, tmp_path / "judge"))


def test_the_embedded_model_has_a_judge_and_others_have_a_default(tmp_path: Path) -> None:
    assert judge_folder() == judge_folder(EMBEDDED) == JUDGE.embedded
    assert EvalConfig().clips(EMBEDDED) == (EMBEDDED,)
    assert EvalConfig().clips("owner/model") == (DEFAULT_CLIP,)
    with pytest.raises(ValueError, match=r"has no open_clip_config\.json: give a CLIP in open_clip's format"):
        judge_folder(str(tmp_path))


def test_a_judge_on_the_hub_is_fetched_once_and_its_pickled_weights_only_without_others(
    hub: HubServer, folder: Path
) -> None:
    repo = Repo.of(folder)
    pickled = {name: content for name, content in repo.files.items() if name != SAFETENSORS}
    hub.repos |= {"o/clip": Repo(repo.files | {PICKLE: b"a pickle", "model.safetensors": b"of transformers"})}
    found = judge_folder("o/clip@v1")
    assert (found / SAFETENSORS).exists() and not (found / PICKLE).exists()
    assert sorted(hub.downloads()) == sorted(repo.files)
    assert judge_folder("o/clip@v1") == found and len(hub.downloads()) == len(repo.files)
    assert judge_revision("o/clip") == judge_revision(EMBEDDED)
    torch.save(load_file(folder / SAFETENSORS), folder / PICKLE)
    hub.repos["o/old"] = Repo(pickled | {PICKLE: (folder / PICKLE).read_bytes()})
    check_judge("o/old")
    images = np.zeros((1, 64, 64, 3), np.uint8)
    old = ClipModel(judge_folder("o/old")).encode_images(images)
    assert torch.equal(old, ClipModel(found).encode_images(images))
    assert judge_revision("o/old") != judge_revision("o/clip")


def test_a_pickle_that_runs_code_is_refused(folder: Path) -> None:
    class Payload:
        def __reduce__(self):
            return Path.touch, (folder / "ran",)

    torch.save({"state_dict": Payload()}, folder / PICKLE)
    (folder / SAFETENSORS).unlink()
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        ClipModel(judge_folder(str(folder)))
    assert not (folder / "ran").exists()


def test_a_judge_in_a_store_is_fetched(
    s3_uri: Callable[[str], str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCE_RAY_MODEL_CACHE", str(tmp_path / "cache"))
    ref = s3_uri("judges/clip")
    for name, content in Repo.of(folder).files.items():
        Store(ref).write_bytes(name, content)
    assert "to download" in check_judge(ref)
    assert judge_revision(ref) == judge_revision(EMBEDDED)
    assert check_judge(ref).startswith("in ")


def test_a_clip_without_a_tokenizer_of_its_own_uses_open_clips(folder: Path) -> None:
    config = (folder / JUDGE.config).read_text()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        check_judge(str(folder))
    (folder / JUDGE.config).write_text(config.replace('"hf_tokenizer_name": "local",', ""))
    check_judge(str(folder))
