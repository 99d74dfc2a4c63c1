"""Adapters are loaded exactly or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import JanusForConditionalGeneration

from vce_ray.config import EMBEDDED, TrainConfig
from vce_ray.errors import UserError
from vce_ray.models.adapter import (
    FULL_WEIGHTS,
    PEFT_CONFIG,
    WEIGHTS,
    attach_adapter,
    merge_adapter,
    remove_lora,
    save_adapter,
)
from vce_ray.models.adapter_location import CARD, check_adapter, run_adapter
from vce_ray.models.base import ImageModel
from vce_ray.models.folder import model_folder
from vce_ray.models.llamagen.gpt import GPTConfig, LlamaGenGPT
from vce_ray.models.load import load_model
from vce_ray.storage.folder import FOLDER_INDEX
from vce_ray.storage.store import Store, StoreError
from vce_ray.training.trainable import make_trainable

STORED = Path(__file__).parents[1] / "data/run_0_1/adapter"
Tensors = dict[str, Tensor]
Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> ImageModel:
    """A base that no test may change."""
    return load_model()


@pytest.fixture(scope="module")
def base_logits(model: ImageModel) -> Tensor:
    return logits(model)


@torch.no_grad()
def logits(model: ImageModel) -> Tensor:
    return model.image_logits(model.encode_prompts(["a deer on a blue background"]), torch.arange(64)[None])


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """The adapter of version 0.1.0, without its folder index."""
    folder = copytree(STORED, tmp_path / "lora")
    (folder / FOLDER_INDEX).unlink()
    return folder


@pytest.fixture(scope="module")
def full_state() -> Tensors:
    """The weights of a full training of the embedded model."""
    net = load_model().net
    make_trainable(net, TrainConfig(method="vsafe_dpo", weights="full"))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.9)
    return trained_state(net)


def trained_state(net: torch.nn.Module) -> Tensors:
    """The state dict of a trained net, as the trainer gathers it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return {name: x for name, x in get_model_state_dict(net, options=options).items() if isinstance(x, Tensor)}


@pytest.fixture
def full(tmp_path: Path, model: ImageModel, full_state: Tensors) -> Path:
    save_adapter(tmp_path / "full", full_state, model, None, {"concept": "deer", "run": "all"})
    return tmp_path / "full"


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file({name: x.contiguous() for name, x in change(load_file(file)).items()}, file)


def edit(file: Path, change: Callable[[dict], dict]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def assert_refused(model: ImageModel, base_logits: Tensor, folder: Path, *messages: str) -> None:
    """Check the message, and that the model is still the base: its weights, their names and what trains."""
    before = {name: (id(x), x._version, x.requires_grad) for name, x in model.net.named_parameters()}
    with pytest.raises(UserError) as error:
        attach_adapter(model, folder)
    for message in (folder.name, *messages):
        assert message in str(error.value), str(error.value)
    assert {name: (id(x), x._version, x.requires_grad) for name, x in model.net.named_parameters()} == before
    assert torch.equal(logits(model), base_logits)


TENSOR_DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "no tensors": (lambda s: {}, ["of 84 tensors: 84 missing", "layers.0.mlp.down_proj.lora_A.weight, ", ", ...)"]),
    "layer 0 only": (lambda s: {k: x for k, x in s.items() if ".layers.0." in k}, ["70 missing", "layers.1.mlp"]),
    "lora_A only": (lambda s: {k: x for k, x in s.items() if "lora_A" in k}, ["42 missing", "lora_B.weight"]),
    "one missing": (
        lambda s: {k: x for k, x in s.items() if k != f"{Q0}.lora_B.weight"},
        [f"1 missing ({Q0}.lora_B.weight): fetch the adapter again"],
    ),
    "other adapter name": (
        lambda s: {k.replace(".weight", ".default_0.weight"): x for k, x in s.items()},
        ["84 missing", "84 unexpected", "lora_A.default_0.weight"],
    ),
    "without peft's prefix": (
        lambda s: {k.removeprefix("base_model.model."): x for k, x in s.items()},
        ["84 missing", "84 unexpected (model.language_model.layers.0"],
    ),
    "one more": (lambda s: s | {"extra.lora_A.weight": torch.zeros(1, 1)}, ["1 unexpected (extra.lora_A.weight)"]),
    "other module": (
        lambda s: {k.replace("layers.5", "layers.6"): x for k, x in s.items()},
        ["14 missing", "14 unexpected", "layers.6.mlp"],
    ),
    "transposed": (
        lambda s: s | {f"{Q0}.lora_A.weight": s[f"{Q0}.lora_A.weight"].T},
        [f"1 of another shape ({Q0}.lora_A.weight is [256, 1], not [1, 256])"],
    ),
    "half a row": (
        lambda s: s | {f"{Q0}.lora_A.weight": s[f"{Q0}.lora_A.weight"][:, :128]},
        ["is [1, 128], not [1, 256]"],
    ),
    "integers": (
        lambda s: s | {f"{Q0}.lora_A.weight": s[f"{Q0}.lora_A.weight"].long()},
        [f"1 not of floats ({Q0}.lora_A.weight is torch.int64)"],
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_a_lora_with_other_tensors_is_refused(damage: str, model: ImageModel, base_logits: Tensor, lora: Path) -> None:
    change, messages = TENSOR_DAMAGE[damage]
    rewrite(lora / WEIGHTS, change)
    assert_refused(model, base_logits, lora, "concept 'deer', run 'stored'", "does not fit its base", *messages)


def test_full_weights_with_other_tensors_are_refused(model: ImageModel, base_logits: Tensor, full: Path) -> None:
    q0 = "model.language_model.layers.0.self_attn.q_proj.weight"
    whole = load_file(full / FULL_WEIGHTS)
    save_file({q0: whole[q0]}, full / FULL_WEIGHTS)
    assert_refused(model, base_logits, full, "run 'all'", "of 58 tensors: 57 missing (model.generation_head.")
    save_file(whole | {"model.vision_model.x": torch.zeros(1)}, full / FULL_WEIGHTS)
    assert_refused(model, base_logits, full, "1 unexpected (model.vision_model.x)")
    save_file(whole | {q0: whole[q0][:1]}, full / FULL_WEIGHTS)
    assert_refused(model, base_logits, full, f"1 of another shape ({q0} is [1, 256], not [256, 256])")
    save_file({f"module.{name}": x for name, x in whole.items()}, full / FULL_WEIGHTS)
    assert_refused(model, base_logits, full, "58 missing", "59 unexpected (module.lm_head.weight, ")
    (full / FULL_WEIGHTS).unlink()
    assert_refused(model, base_logits, full, "weights.safetensors is missing")


def test_a_file_that_is_no_safetensors_is_refused(model: ImageModel, base_logits: Tensor, lora: Path) -> None:
    data = (lora / WEIGHTS).read_bytes()
    for damaged in (b"", data[:4], data[:1000], data[:-1], b"x" * 100, data[:200] + b"\xff" + data[201:]):
        (lora / WEIGHTS).write_bytes(damaged)
        assert_refused(model, base_logits, lora, "adapter_model.safetensors cannot be read", "fetch the adapter again")
    (lora / WEIGHTS).unlink()
    assert_refused(model, base_logits, lora, "incomplete, adapter_model.safetensors is missing")


CARDS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "other base": (lambda card: card | {"base_revision": "0" * 16}, "base revision 0000000000000000, this base is"),
    "other rank": (lambda card: card | {"lora": {"rank": 2, "alpha": 32}}, "{'rank': 2, 'alpha': 32}, adapter_config"),
    "other alpha": (lambda card: card | {"lora": {"rank": 1, "alpha": 1}}, "{'rank': 1, 'alpha': 1}, adapter_config"),
    "rank 0": (lambda card: card | {"lora": {"rank": 0, "alpha": 1}}, "rank and alpha of at least 1"),
    "no alpha": (lambda card: card | {"lora": {"rank": 1}}, "rank and alpha of at least 1"),
    "full weights": (lambda card: card | {"lora": None}, "weights.safetensors is missing"),
    "lora missing": (lambda card: {"base_revision": card["base_revision"]}, "needs base_revision and lora"),
    "base missing": (lambda card: {"lora": card["lora"]}, "needs base_revision and lora"),
    "a list": (lambda card: [card], "needs base_revision and lora"),
}


@pytest.mark.parametrize("damage", CARDS)
def test_another_card_is_refused(damage: str, model: ImageModel, base_logits: Tensor, lora: Path) -> None:
    change, message = CARDS[damage]
    edit(lora / CARD, change)
    assert_refused(model, base_logits, lora, message)


def test_another_rank_is_refused_by_the_shapes(model: ImageModel, base_logits: Tensor, lora: Path) -> None:
    edit(lora / CARD, lambda card: card | {"lora": {"rank": 2, "alpha": 32}})
    edit(lora / PEFT_CONFIG, lambda config: config | {"r": 2})
    assert_refused(
        model, base_logits, lora, "of rank 2 does not fit", "84 of another shape", "is [1, 704], not [2, 704]"
    )
    (lora / PEFT_CONFIG).unlink()
    assert_refused(model, base_logits, lora, "of rank 2 does not fit")
    (lora / PEFT_CONFIG).write_text("{")
    assert_refused(model, base_logits, lora, "adapter_config.json is damaged")


def test_a_local_file_that_differs_from_its_digest_is_refused(
    model: ImageModel, base_logits: Tensor, tmp_path: Path
) -> None:
    folder = copytree(STORED, tmp_path / "copy")
    rewrite(folder / WEIGHTS, lambda state: {name: 2 * x for name, x in state.items()})
    assert_refused(model, base_logits, folder, "adapter_model.safetensors differs from its digest", "_files.json")
    with pytest.raises(UserError, match="differs from its digest"):
        check_adapter(EMBEDDED, str(folder))
    (folder / WEIGHTS).write_bytes((STORED / WEIGHTS).read_bytes())
    (folder / PEFT_CONFIG).unlink()
    assert_refused(model, base_logits, folder, "incomplete, adapter_config.json is missing")
    for index in ({"files": {}}, {}, [], {"files": {CARD: "0"}}):
        (folder / FOLDER_INDEX).write_text(json.dumps(index))
        assert_refused(model, base_logits, folder, "does not list vce_ray.json and adapter_model.safetensors")
    (folder / FOLDER_INDEX).write_text("{")
    assert_refused(model, base_logits, folder, "_files.json is not JSON")


def test_check_adapter_refuses_what_can_be_seen_without_the_model(lora: Path, tmp_path: Path) -> None:
    store, uri = Store(tmp_path), f"file://{lora}"
    with pytest.raises(StoreError, match=r"_files\.json"):
        check_adapter(EMBEDDED, uri)
    store.upload(lora, "lora")
    assert check_adapter(EMBEDDED, uri) == check_adapter(EMBEDDED, str(lora))
    edit(lora / CARD, lambda card: card | {"lora": None})
    with pytest.raises(UserError, match=r"does not list vce_ray\.json and weights\.safetensors"):
        check_adapter(EMBEDDED, uri)
    with pytest.raises(UserError, match=r"_files\.json.* does not list vce_ray\.json and weights\.safetensors"):
        check_adapter(EMBEDDED, str(lora))
    (lora / FOLDER_INDEX).unlink()
    with pytest.raises(UserError, match=r"incomplete, weights\.safetensors is missing"):
        check_adapter(EMBEDDED, str(lora))


def test_a_refused_adapter_of_a_run_is_an_error_of_its_store(lora: Path, tmp_path: Path) -> None:
    rewrite(lora / WEIGHTS, lambda state: {name: x for name, x in state.items() if ".layers.0." in name})
    store = Store(tmp_path / "run")
    store.upload(lora, "adapter")
    with (
        pytest.raises(StoreError, match=r"run/adapter cannot be used: adapter .* 70 missing"),
        run_adapter(store) as it,
    ):
        load_model(adapter=it)


def test_the_adapter_of_version_0_1_is_loaded_and_plain_peft_computes_the_same(base_logits: Tensor) -> None:
    ours = load_model()
    attach_adapter(ours, STORED)
    with_adapter = logits(ours)
    assert not torch.allclose(with_adapter, base_logits)
    assert PeftConfig.from_pretrained(str(STORED)).peft_type == "LORA"
    base: Any = JanusForConditionalGeneration.from_pretrained(model_folder(EMBEDDED))
    theirs = load_model()
    theirs.net = PeftModel.from_pretrained(base, str(STORED)).get_base_model().eval()
    assert torch.equal(logits(theirs), with_adapter)
    remove_lora(ours.net)
    assert torch.equal(logits(ours), base_logits)


def test_a_new_adapter_is_loaded_again_after_a_refusal(base_logits: Tensor, lora: Path) -> None:
    model = load_model()
    state = {name.removeprefix("base_model.model."): x for name, x in load_file(lora / WEIGHTS).items()}
    rewrite(lora / WEIGHTS, lambda state: {})
    assert_refused(model, base_logits, lora, "84 missing")
    Store(lora.parent).upload(lora, lora.name)
    save_adapter(lora, state, model, {"rank": 1, "alpha": 32}, {})  # replaces the index too
    attach_adapter(model, lora)
    with pytest.raises(AssertionError, match="merge the first adapter"):
        attach_adapter(model, lora)
    attached = logits(model)
    merge_adapter(model.net)
    assert torch.allclose(logits(model), attached, atol=1e-4) and not torch.allclose(attached, base_logits)
    save_adapter(lora, {k: 0 * x for k, x in state.items()}, model, {"rank": 1, "alpha": 32}, {})
    assert torch.equal(logits(load_model(adapter=lora)), base_logits), "an adapter that changes nothing is legal"


def test_full_weights_are_loaded(base_logits: Tensor, full: Path, full_state: Tensors) -> None:
    assert "lm_head.weight" in full_state, "the trainer saves the second name of a tied weight, though it is frozen"
    model = load_model(adapter=full)
    assert not torch.allclose(logits(model), base_logits)
    for name, x in model.net.state_dict().items():
        assert name not in full_state or torch.equal(x, full_state[name]), name
    other = full_state | {"lm_head.weight": torch.zeros_like(full_state["lm_head.weight"])}
    save_adapter(full, other, model, None, {})
    assert torch.equal(logits(load_model(adapter=full)), logits(model)), "frozen weights are not loaded"


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_what_llamagen_saves_is_loaded(weights: Any, tmp_path: Path) -> None:
    sizes = GPTConfig(layers=2, heads=4, width=64, vocab_size=128, image_size=256)
    trained, fresh = LlamaGenGPT(sizes), LlamaGenGPT(sizes)
    make_trainable(trained, TrainConfig(method="vsafe_dpo", weights=weights, lora_rank=2))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    state = trained_state(trained)
    lora = {"rank": 2, "alpha": 32} if weights == "lora" else None
    saved = {name.replace(".default.", "."): x for name, x in state.items() if lora is None or "lora_" in name}
    assert ("uncond_embedding" in saved) == (lora is None), "a buffer is saved with full weights"
    model: Any = SimpleNamespace(net=fresh, revision="0123456789abcdef", ref="owner/llamagen")
    save_adapter(tmp_path, saved, model, lora, {})
    attach_adapter(model, tmp_path)
    loaded = fresh.state_dict()
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert len(names) == (28 if lora else 19) and all(torch.equal(loaded[name], state[name]) for name in names)
