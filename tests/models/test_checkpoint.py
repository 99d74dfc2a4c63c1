"""Checkpoints in every dtype and format that people have: loaded where possible, else refused in one line.

All are made from a small Janus with random weights, saved by transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.check import check_base
from vce_ray.models.folder import base_stamp, model_dtype, model_folder
from vce_ray.models.load import load_model
from vce_ray.pipeline.preflight import prepare
from vce_ray.sampling import draw
from vce_ray.training.reference import reference_log_probs

WEIGHTS = "model.safetensors"
QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Janus with one layer of width 32, in bfloat16."""
    folder = tmp_path_factory.mktemp("janus")
    config: dict[str, Any] = JanusConfig.from_pretrained(model_folder(EMBEDDED)).to_dict()
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config["vision_config"] |= {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
    }
    config["vq_config"] |= {"projection_dim": 32, "image_token_embed_dim": 32}
    torch.manual_seed(0)
    net: Any = JanusForConditionalGeneration(JanusConfig.from_dict(config))
    net.to(torch.bfloat16).save_pretrained(folder)
    JanusProcessor.from_pretrained(model_folder(EMBEDDED)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(janus: Path, tmp_path: Path) -> Path:
    return shutil.copytree(janus, tmp_path / "base")


def set_config(folder: Path, **changes: Any) -> None:
    """Set keys of a config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: x for key, x in config.items() if x is not None}))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "bfloat16"),
        ({"dtype": "auto"}, "bfloat16"),
        ({"dtype": None}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "auto"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_weights_have_the_dtype_that_is_named_or_stored(folder: Path, changes: dict, dtype: str) -> None:
    set_config(folder, **changes)
    assert model_dtype(folder) == dtype == base_stamp(str(folder))["dtype"]
    model = load_model(str(folder), device="cpu")
    assert str(model.image_head.proj_out.weight.dtype) == f"torch.{dtype}"
    tokens = draw(model, ["a deer"], [0], SamplingConfig())
    chosen, rejected = reference_log_probs(model, ["a deer"], False, tokens, tokens.flip(1))
    assert torch.isfinite(chosen).all() and torch.isfinite(rejected).all()


def test_the_dtype_of_most_weights_counts(folder: Path) -> None:
    set_config(folder, dtype="auto")
    state = load_file(folder / WEIGHTS)
    save_file({name: x.float() if x.dim() == 1 else x.half() for name, x in state.items()}, folder / WEIGHTS)
    assert model_dtype(folder) == "float16"
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in state.items()}, folder / WEIGHTS)
    with pytest.raises(UserError, match="are stored as F8_E4M3: known are float32, bfloat16, float16"):
        model_dtype(folder)


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: set_config(folder, **changes)


def wrote(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def as_file(name: str) -> Callable[[Path], object]:
    """The weights in another format."""

    def change(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / name)
        (folder / WEIGHTS).unlink()

    return change


def cut_off(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def sharded(lost: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        net: Any = JanusForConditionalGeneration.from_pretrained(folder)
        (folder / WEIGHTS).unlink()
        net.save_pretrained(folder, max_shard_size="500KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        next(folder.glob(lost)).unlink()

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return apply


BEFORE_A_RUN: dict[str, tuple[Callable[[Path], object], str]] = {
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes"}), "are quantized (bitsandbytes, "),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "are quantized (gptq, "),
    "awq": (config(quantization_config={"quant_method": "awq"}), "are quantized (awq, "),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), "give the checkpoint that it was made from"),
    "old 4 bit": (config(quantization_config={"load_in_4bit": True}), "are quantized (by an unnamed method, "),
    "in a part": (config(text_config={"quantization_config": {"quant_method": "compressed-tensors"}}),
                  "are quantized (compressed-tensors, "),
    "float8": (config(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn': known are float32, bfloat16, float16, and auto"),
    "a number": (config(dtype=16), "has dtype '16'"),
    "LLaVA": (config(model_type="llava"), "has model_type 'llava': known are janus, llamagen; give a Janus, such as"),
    "no type": (config(model_type=None), "has no model_type: known are"),
    "odd type": (config(model_type=["janus"]), "has model_type ['janus']"),
    "a list": (wrote("config.json", b"[]"), "holds no settings but []"),
    "UTF-16": (wrote("config.json", b"\xff\xfe{\x00"), "is not JSON"),
    "no config": (without("config.json"), "has no config.json: give a checkpoint in transformers' format"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json or tokenizer.model"),
    "no special tokens": (without("tokenizer_config.json"), "has no tokenizer_config.json"),
    "no processor": (without("processor_config.json"), "has no processor_config.json or preprocessor_config.json"),
    "no chat template": (without("chat_template.jinja"), "has no chat template (chat_template.jinja): copy or"),
    "no weights": (without(WEIGHTS), "has no weights in *.safetensors: copy or download"),
    "pickle": (as_file("pytorch_model.bin"), "only pytorch_model.bin: convert them with transformers"),
    "GGUF": (as_file("janus-Q4_K_M.gguf"), "only janus-Q4_K_M.gguf: GGUF files are quantized"),
    "cut off": (cut_off, f"{WEIGHTS} is cut off or damaged (Error while deserializing header: incomplete metadata"),
    "empty": (wrote(WEIGHTS, b""), "header too small): download"),
    "pointer": (wrote(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "git lfs pull"),
    "lost shard": (sharded("model-00002*"), "lacks model-00002-of-000"),
    "lost index": (sharded("*.index.json"), "but no *.safetensors.index.json, which lists its other files"),
    "bad index": (wrote(f"{WEIGHTS}.index.json", b"{}"), "has a damaged model.safetensors.index.json"),
}  # fmt: skip
"""What can be told from config.json, the names of files and the headers of weights."""
ON_LOADING: dict[str, tuple[Callable[[Path], object], str]] = {
    "bad tokenizer": (wrote("tokenizer.json", b"{"), "tokenizer or image processor of"),
    "other tokenizer": (wrote("tokenizer.json", b'{"version": "1.0"}'), "tokenizer or image processor of"),
    "bad config": (config(text_config="llama"), "config, tokenizer or image processor of"),
    "lost tensor": (tensors(lambda state: state.pop(QUERY)), f"do not fit its config.json: 1 missing ({QUERY})"),
    "shape": (tensors(lambda state: state.update({QUERY: state[QUERY][:8].contiguous()})),
              f"1 of another shape ({QUERY} is [8, 32], not [32, 32])"),
}  # fmt: skip


def refused(check: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as error:
        check()
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("case", BEFORE_A_RUN)
def test_what_is_known_without_weights_is_refused_before_a_run(case: str, folder: Path, tmp_path: Path) -> None:
    change, message = BEFORE_A_RUN[case]
    change(folder)
    judge = model_folder(EMBEDDED).with_name("judge")
    settings = {"concept": "deer", "base": str(folder), "store": str(tmp_path), "evaluation": {"judge": str(judge)}}
    refused(lambda: prepare(settings), message)
    refused(lambda: prepare({"concept": "deer", "captioner": str(folder), "store": str(tmp_path)}), message)
    refused(lambda: load_model(str(folder)), message)


@pytest.mark.parametrize("case", ON_LOADING)
def test_the_rest_is_refused_on_loading(case: str, folder: Path) -> None:
    change, message = ON_LOADING[case]
    change(folder)
    check_base(str(folder))
    refused(lambda: load_model(str(folder)), message)


def test_shards_are_loaded(folder: Path) -> None:
    whole = load_model(str(folder))
    sharded("generation_config.json")(folder)
    parts = load_model(str(folder))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters(), strict=True))
    check_base(str(folder))
    next(folder.glob("model-00001*")).unlink()
    refused(lambda: check_base(str(folder)), "lacks model-00001-of-000")


def test_files_and_pipelines_are_no_checkpoints(tmp_path: Path) -> None:
    for name, message in (
        ("janus.gguf", "GGUF files are quantized"),
        (WEIGHTS, "is a file: give a folder with config.json"),
    ):
        (tmp_path / name).touch()
        refused(lambda name=name: check_base(str(tmp_path / name)), message)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    refused(lambda: check_base(str(tmp_path)), "model_index.json: it is a pipeline of diffusers")
