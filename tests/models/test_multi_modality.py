"""Janus in DeepSeek's own format: converted completely, or refused in one line.

A converted checkpoint is held against the modules that DeepSeek builds a Janus of (deepseek_checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepseek_checkpoint as deepseek
import pytest
import torch
from hub_server import HubServer, Repo
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration

from vce_ray.cli.app import main
from vce_ray.config import SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models import multi_modality
from vce_ray.models.check import check_base
from vce_ray.models.families import family_of
from vce_ray.models.load import load_model
from vce_ray.models.multi_modality import convert, janus_config, released_shapes, unused_shapes
from vce_ray.models.multi_modality_processor import make_processor
from vce_ray.sampling import draw
from vce_ray.storage.store import Store

PUBLISHED = Path(__file__).parents[1] / "data/janus"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """One thread, and the sizes of the small model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        deepseek.register(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek.write(tmp_path_factory.mktemp("deepseek"), "bin")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "janus"
    assert main(["convert", str(source), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def model(converted: Path) -> Any:
    return load_model(str(converted), "cpu")


@pytest.fixture(scope="module")
def original() -> deepseek.DeepSeekJanus:
    return deepseek.DeepSeekJanus()


@pytest.mark.parametrize("prompt", ["a deer", "two foxes, in the style of openmoji!", "a house\n\non 3 hills"])
def test_it_draws_what_deepseeks_loop_draws(model: Any, original: deepseek.DeepSeekJanus, prompt: str) -> None:
    chat = f"{deepseek.USER}: {prompt}\n\n{deepseek.ASSISTANT}:{deepseek.BEGIN}"
    ids = [deepseek.IDS[deepseek.BOS], *deepseek.tokenizer().encode(chat).ids]
    tokens = draw(model, [prompt], [0], SamplingConfig(temperature=0, guidance_scale=5.0))
    assert tokens[0].tolist() == original.draw(ids)
    assert len(tokens[0].unique()) > 3


@torch.no_grad()
def test_every_part_computes_the_same(model: Any, original: deepseek.DeepSeekJanus) -> None:
    pixels = torch.randn(2, 3, deepseek.IMAGE_SIZE, deepseek.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    seen = model.net.model.get_image_features(pixels).pooler_output
    assert (seen - original.see(pixels)).abs().max() < 1e-5 and seen.std() > 0.1
    ids = torch.tensor([[deepseek.IDS[deepseek.BOS], 25, 257, 498]])
    read = model.net(input_ids=ids).logits
    assert (read - original.language_model(input_ids=ids).logits).abs().max() < 1e-4, "the head that reads is its own"
    codes = torch.randint(0, deepseek.CODES, (2, deepseek.TOKENS), generator=torch.Generator().manual_seed(2))
    assert (model.embed_image_tokens(codes) - original.embed_codes(codes)).abs().max() < 1e-5
    pictures = original.gen_vision_model.decode_pixels(codes)
    assert abs(model.decode_pixels(codes).astype(int) - pictures).max() <= 1 and pictures.std() > 1
    assert torch.equal(model.encode_pixels(pictures), original.gen_vision_model.encode_pixels(pictures))


def test_images_are_described_in_the_words_of_deepseeks_processor(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are those that transformers' own tests expect of its conversions."""
    image, question = {"type": "image"}, {"type": "text", "text": "What is shown in this image?"}
    for parts, said in (([question, image], "{q}\n{i}"), ([image, question], "{i}\n{q}")):
        chat = [{"role": "User", "content": parts}]
        text = model.processor.apply_chat_template(chat, add_generation_prompt=True)
        words = said.format(q=question["text"], i=deepseek.IMAGE)
        assert text == f"{deepseek.USER}: {words}\n\n{deepseek.ASSISTANT}:"
    assert model.processor.use_default_system_prompt
    images = (torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(3)) * 255).byte().numpy()
    monkeypatch.setattr("vce_ray.models.janus.MAX_NEW_TOKENS", 4)
    answers = model.caption(images)
    assert all(text and not complete for text, complete in answers) and answers[0] != answers[1]


@pytest.mark.parametrize(("kind", "shards"), [("bin", 3), ("safetensors", 1), ("safetensors", 2)])
def test_shards_of_torch_and_safetensors_are_read(kind: Any, shards: int, converted: Path, tmp_path: Path) -> None:
    folder = deepseek.write(tmp_path / "source", kind, shards)
    convert(str(folder), tmp_path / "out")
    found, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "out", converted))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_is_fetched_from_a_hub_or_a_store(
    source: Path, converted: Path, tmp_path: Path, hub: HubServer, s3_uri: Callable[[str], str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("VCE_RAY_MODEL_CACHE", str(tmp_path / "cache"))
    hub.repos["owner/janus"] = Repo.of(source)
    Store(s3_uri("originals")).upload(source, "janus")
    for i, ref in enumerate(("owner/janus", s3_uri("originals/janus"))):
        assert main(["convert", ref, "--out", str(tmp_path / str(i))]) == 0
        assert (tmp_path / str(i) / "config.json").read_bytes() == (converted / "config.json").read_bytes()
        assert load_file(tmp_path / str(i) / "model.safetensors").keys()


def test_large_models_are_written_in_parts(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_modality, "SHARD_BYTES", 5_000_000)
    convert(str(source), tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    check_base(str(tmp_path))
    parts = load_model(str(tmp_path), "cpu").net.state_dict()
    whole = load_model(str(converted), "cpu").net.state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_format_of_the_first_janus_says_user_and_assistant(tmp_path: Path) -> None:
    folder = deepseek.write(tmp_path / "source", "bin", sft_format="deepseek_old")
    convert(str(folder), tmp_path / "out")
    model: Any = load_model(str(tmp_path / "out"), "cpu")
    row = model.encode_prompts(["a deer"]).embeds_BPE[0]
    ids = deepseek.tokenizer(roles=False).encode(f"User: a deer\n\nAssistant:{deepseek.BEGIN}").ids
    expected = model.language_model.embed_tokens(torch.tensor([deepseek.IDS[deepseek.BOS], *ids]))
    assert torch.equal(row, expected)


def test_plain_transformers_draws_from_it(converted: Path, model: Any) -> None:
    net: Any = JanusForConditionalGeneration.from_pretrained(converted)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a deer"}]}]
    text = model.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = model.processor(text=[text], generation_mode="image", return_tensors="pt")
    tokens = net.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=5)
    assert torch.equal(tokens, draw(model, ["a deer"], [0], SamplingConfig(temperature=0, guidance_scale=5.0)))


def test_the_error_for_the_original_names_the_command(source: Path, converted: Path) -> None:
    with pytest.raises(UserError, match=rf"vce-ray convert {source} --out folder"):
        family_of(str(source))
    with pytest.raises(UserError, match="has model_type 'janus', not 'multi_modality'"):
        convert(str(converted), converted)


def settings(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change a JSON file; 'a.b' is key b of a."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *parents, key = path.split("__")
            place = content
            for parent in parents:
                place = place[parent]
            if value is None:
                del place[key]
            else:
                place[key] = value
        (folder / name).write_text(json.dumps(content))

    return change


def weights(**changes: torch.Tensor | None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "pytorch_model.bin")

    return change


class Harm:
    """Would write a file if it were unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harmed"),))


def pickled(folder: Path) -> None:
    torch.save({"gen_embed.weight": Harm()}, folder / "pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (weights(gen_embed__weight=None), "gen_embed.weight is missing, expected [64, 8]"),
    "extra": (weights(gen_embed__bias=torch.zeros(3)), "gen_embed.bias of [3] is not expected"),
    "shape": (weights(gen_embed__weight=torch.zeros(64, 4)), "gen_embed.weight is [64, 4], expected [64, 8]"),
    "unused": (weights(gen_vision_model__quantize__codebook_used=torch.zeros(3)), "is [3], expected [65536]"),
    "code": (pickled, "is not a checkpoint of plain tensors"),
    "no weights": (lambda folder: (folder / "pytorch_model.bin").unlink(), "neither model.safetensors nor pytorch_mod"),
    "tower": (settings("config.json", vision_config__params__model_name="sam_b"), "vision tower 'sam_b': known are"),
    "image tokenizer": (settings("config.json", gen_vision_config__cls="VQ-8"), "image tokenizer 'VQ-8': known are"),
    "class": (settings("config.json", aligner_config__cls="Linear"), "aligner_config has cls 'Linear', not 'MlpProj"),
    "projector": (settings("config.json", aligner_config__params__projector_type="linear"), "not 'mlp_gelu'"),
    "parameter": (settings("config.json", vision_config__params__pixel_mean=[1]), "has pixel_mean, which is not known"),
    "no parameter": (settings("config.json", gen_head_config__params__n_embed=None), "has no usable n_embed"),
    "no part": (settings("config.json", gen_head_config=None), "has no gen_head_config with params: give a Janus in"),
    "no language": (settings("config.json", language_config=None), "has no language_config"),
    "language": (settings("config.json", language_config__hidden_size="wide"), "language_config in config.json of"),
    "widths": (settings("config.json", aligner_config__params__n_embed=64), "aligner_config gives 64 where the next"),
    "dtype": (settings("config.json", torch_dtype="float64"), "has the dtype 'float64'"),
    "format": (settings("processor_config.json", sft_format="llama2"), "sft_format 'llama2': known are deepseek, deep"),
    "roles": (lambda folder: deepseek.tokenizer(roles=False).save(str(folder / "tokenizer.json")), "no token <|User|>"),
    "pad": (settings("processor_config.json", pad_tag="<none>"), "does not know pad_token '<none>'"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json of"),
    "images": (settings("preprocessor_config.json", image_size=None), "has no image_size"),
    "processor": (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_match_is_refused_in_one_line(case: str, tmp_path: Path, capsys: Any) -> None:
    change, message = REFUSED[case]
    folder = deepseek.write(tmp_path / "source", "bin")
    change(folder)
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and len(error) < 700
    assert not (tmp_path / "out/config.json").exists() and not Path("harmed").exists()


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_lost_or_doubled_shard_is_refused(kind: Any, tmp_path: Path) -> None:
    folder = deepseek.write(tmp_path / "source", kind, shards=2)
    first, second = sorted(folder.glob(f"*0000?-of-00002.{kind}"))
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match="which another file has too"):
        convert(str(folder), tmp_path / "out")
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged|not a checkpoint"):
        convert(str(folder), tmp_path / "out")
    second.unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.\w+ (is missing|does not exist)"):
        convert(str(folder), tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_modality, "free_space", lambda folder: 1e6)
    with pytest.raises(UserError, match=r"needs 0\.0\d GB, the disk of .* has 0\.00 GB free: free some, or give --out"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_nothing_uses_may_be_left_out(source: Path, converted: Path, tmp_path: Path) -> None:
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    unused = [name for name in state if "attn_pool" in name or name.endswith("codebook_used")]
    shapes = {name: tuple(state[name].shape) for name in unused}
    assert unused_shapes(JanusConfig.from_pretrained(converted)) == shapes, "as timm and LlamaGen have them"
    folder = deepseek.write(tmp_path / "source", "safetensors")
    save_file({name: x for name, x in state.items() if name not in unused}, folder / "model.safetensors")
    convert(str(folder), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(converted / "model.safetensors").keys()


def test_a_published_config_without_the_key_of_tied_embeddings_keeps_its_own_head(
    converted: Path, original: deepseek.DeepSeekJanus, tmp_path: Path
) -> None:
    """transformers 5 ties the head to the embeddings unless config.json or the weights say otherwise."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in converted.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings("config.json", tie_word_embeddings=None, text_config__tie_word_embeddings=None)(folder)
    head = load_model(str(folder), "cpu").net.lm_head.weight
    assert torch.equal(head, original.language_model.lm_head.weight)


@pytest.mark.parametrize(("name", "gigabytes"), [("Janus-Pro-1B", 4.18), ("Janus-Pro-7B", 14.84), ("Janus-1.3B", 4.18)])
def test_released_configs_give_the_published_ones_and_the_published_size(name: str, gigabytes: float) -> None:
    """Key for key; tests/data/janus/README.md says where each list is from."""
    published = json.loads((PUBLISHED / f"{name}.json").read_text())
    folder_tokens = {"bos_token_id": 100_000, "eos_token_id": 100_001, "pad_token_id": 100_002}
    tokenizer: Any = type("Tokenizer", (), {**folder_tokens, "image_token": deepseek.IMAGE})()
    tokenizer.convert_tokens_to_ids = deepseek.IDS.get
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(multi_modality.IMAGE_TOKENIZERS, "VQ-16", VQ_16)
        config = janus_config(published["deepseek"], tokenizer, name)
    for part, expected in published["transformers"].items():
        found = config.to_dict()[part]
        if isinstance(expected, dict):
            assert {key: found[key] for key in expected} == expected
        else:
            assert found == expected
    with torch.device("meta"):
        shapes = {key: tuple(x.shape) for key, x in JanusForConditionalGeneration(config).state_dict().items()}
    sizes = [torch.Size(shape).numel() for shape in (released_shapes(shapes) | unused_shapes(config)).values()]
    assert sum(sizes) * 2 / 1e9 == pytest.approx(gigabytes, abs=0.006), "bytes in bfloat16"


VQ_16 = dict(multi_modality.IMAGE_TOKENIZERS["VQ-16"])


def test_the_converted_tokenizer_keeps_all_ids(source: Path) -> None:
    tokenizer = make_processor(source).tokenizer
    for token, number in (deepseek.IDS | deepseek.ROLE_IDS).items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    text = f"{deepseek.USER}: a deer, 12 \u4e2d\u6587\n\n{deepseek.ASSISTANT}:"
    assert tokenizer(text)["input_ids"] == [deepseek.IDS[deepseek.BOS], *deepseek.tokenizer().encode(text).ids]
