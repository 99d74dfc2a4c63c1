"""The embedded model in plain transformers and behind ImageModel."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from tools.emoji_world.scenes import held_out, render
from tools.emoji_world.world import OBJECTS, Scene
from vce_ray.config import EMBEDDED
from vce_ray.models.adapter import add_lora, attach_adapter, merge_adapter
from vce_ray.models.folder import folder_revision, model_folder
from vce_ray.models.load import load_model
from vce_ray.training.trainable import adapter_off


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(2)
    return load_model()


@pytest.fixture(scope="module")
def renderings() -> tuple[list[Scene], np.ndarray]:
    scenes, images = zip(*held_out(48), strict=True)
    return list(scenes), np.stack(images)


def test_plain_transformers_loads_it_and_draws() -> None:
    folder = model_folder(EMBEDDED)
    net: Any = JanusForConditionalGeneration.from_pretrained(folder)
    processor: Any = JanusProcessor.from_pretrained(folder)
    assert net.dtype == torch.float32
    inputs = processor(text=["a deer on a blue background"], generation_mode="image", return_tensors="pt")
    torch.manual_seed(0)
    tokens = net.generate(**inputs, generation_mode="image", do_sample=True, top_k=0, guidance_scale=5)
    assert tokens.shape == (1, 64)
    image = net.decode_image_tokens(tokens)
    assert image.shape == (1, 64, 64, 3)
    blue = ((image[0, 4:8, 4:60] + 1) * 127.5).mean((0, 1))
    assert (blue - torch.tensor([122.0, 176.0, 240.0])).abs().max() < 30


def test_it_is_small_and_its_revision_is_a_hash_of_its_contents(tmp_path: Path) -> None:
    folder = model_folder(EMBEDDED)
    assert sum(file.stat().st_size for file in folder.parent.rglob("*.safetensors")) <= 25e6
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert folder_revision(copy) == folder_revision(folder)
    (copy / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert folder_revision(copy) != folder_revision(folder)


def test_captions_name_the_object(model, renderings) -> None:
    scenes, images = renderings
    captions = model.caption(images)
    named = [
        f" {OBJECTS[s.thing]} " in f" {c} " for s, (c, _) in zip(scenes, captions, strict=True) if s.thing is not None
    ]
    assert np.mean(named) >= 0.85  # 0.95 on many more images is checked by tools.emoji_world.measure
    assert model.caption(images[3:5]) == captions[3:5]
    assert all(complete for _, complete in captions)


def test_a_caption_that_reaches_the_limit_of_tokens_is_told_from_a_complete_one(
    model, renderings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vce_ray.models.janus.MAX_NEW_TOKENS", 4)
    _, images = renderings
    assert [complete for _, complete in model.caption(images[:2])] == [False, False]


def test_images_survive_encoding_and_decoding(model, renderings) -> None:
    _, images = renderings
    tokens = model.encode_pixels(images)
    assert tokens.shape == (48, 64) and tokens.max() < model.image_vocab_size
    mse = ((model.decode_pixels(tokens).astype(float) - images) ** 2).mean() / 255**2
    assert -10 * np.log10(mse) > 20
    alone = np.concatenate([model.decode_pixels(row[None]) for row in tokens])
    assert np.array_equal(alone, model.decode_pixels(tokens))  # whatever images are beside it
    vq = model.net.model.vqmodel
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        theirs = vq.encode(pixels).image_tokens.view(48, 64)
        assert (tokens == theirs).float().mean() > 0.97  # in float16, the lengths of stored codes differ slightly
        stored = vq.quantize.embedding.weight.clone()
        vq.quantize.embedding.weight.copy_(torch.nn.functional.normalize(stored, dim=1))
        assert torch.equal(tokens, vq.encode(pixels).image_tokens.view(48, 64))
        vq.quantize.embedding.weight.copy_(stored)


def test_teacher_forcing_ignores_padding(model) -> None:
    prompts = ["a deer", "a cat in the style of openmoji on a blue background"]
    tokens = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = model.image_logits(model.encode_prompts(prompts), tokens)
        alone = model.image_logits(model.encode_prompts(prompts[:1]), tokens[:1])
    assert torch.allclose(both[:1], alone, atol=1e-4)


def test_a_new_adapter_changes_nothing_and_can_be_switched_off() -> None:
    model = load_model()
    prompts, tokens = model.encode_prompts(["a deer"]), torch.zeros(1, 64, dtype=torch.long)
    with torch.no_grad():
        base = model.image_logits(prompts, tokens)
        add_lora(model.net, rank=4, alpha=8)
        trained = [name for name, p in model.net.named_parameters() if p.requires_grad]
        assert trained and all("language_model.layers" in name and "lora_" in name for name in trained)
        assert torch.equal(model.image_logits(prompts, tokens), base)
        for name, parameter in model.net.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01)
        changed = model.image_logits(prompts, tokens)
        with adapter_off(model.net):
            assert torch.equal(model.image_logits(prompts, tokens), base)
        assert torch.equal(model.image_logits(prompts, tokens), changed)
        merge_adapter(model.net)
        assert torch.allclose(model.image_logits(prompts, tokens), changed, atol=1e-4)
    assert not torch.allclose(changed, base)
    assert not any("lora_" in name for name, _ in model.net.named_parameters())


def test_a_folder_without_an_adapter_is_rejected(tmp_path: Path, model) -> None:
    with pytest.raises(ValueError, match="is not a vce_ray adapter"):
        attach_adapter(model, tmp_path)


def test_renderings_depend_only_on_their_seed() -> None:
    scene = Scene(2, 2, "blue")
    first, again = (render(scene, random.Random(5)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
