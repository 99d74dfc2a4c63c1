"""LlamaGen: released weights are converted completely or rejected, and compute what the formulas say."""

from __future__ import annotations

import argparse
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from vce_ray.cli.app import main
from vce_ray.config import EMBEDDED, EvalConfig, SamplingConfig
from vce_ray.errors import UserError
from vce_ray.evaluation.judge import judge_folder
from vce_ray.models.adapter import add_lora
from vce_ray.models.folder import files_revision, folder_revision, model_dtype
from vce_ray.models.llamagen import convert, gpt, vq
from vce_ray.models.llamagen.model import encode_features
from vce_ray.models.load import load_model
from vce_ray.pipeline.preflight import open_run
from vce_ray.sampling import draw
from vce_ray.sampling.choose import guide
from vce_ray.sampling.decoder import decoder_of
from vce_ray.training.objectives import objective_for
from vce_ray.training.objectives.vsafe_dpo import VSafeDPOBatch, VSafeDPOConfig
from vce_ray.training.reference import reference_log_probs
from vce_ray.training.terms.batches import PairBatch
from vce_ray.training.terms.divergence import Targets

LAYERS, HEADS, WIDTH, INNER, CODES = 2, 4, 64, 256, 128
LENGTHS = [120, 37, 1]
"""Caption lengths of the rows of the batch."""


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Run on one thread, and add a GPT size small enough for tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt.SIZES, "tiny", (LAYERS, HEADS, WIDTH))
        yield
    torch.set_num_threads(threads)


def released_gpt(layers: int = LAYERS, width: int = WIDTH, inner: int = INNER, codes: int = CODES) -> dict:
    """Random weights of a GPT under the released names, large enough that every part affects the logits."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) * 1.5 / columns**0.5

    weights = {
        "cls_embedding.uncond_embedding": torch.randn(120, 2048),
        "cls_embedding.cap_proj.fc1.weight": matrix(width, 2048),
        "cls_embedding.cap_proj.fc2.weight": matrix(width, width),
        "tok_embeddings.weight": torch.randn(codes, width),
        "norm.weight": 1 + torch.randn(width) / 4,
        "output.weight": matrix(codes, width),
    }
    for i in range(layers):
        weights |= {
            f"layers.{i}.attention.wqkv.weight": matrix(3 * width, width),
            f"layers.{i}.attention.wo.weight": matrix(width, width),
            f"layers.{i}.feed_forward.w1.weight": matrix(inner, width),
            f"layers.{i}.feed_forward.w3.weight": matrix(inner, width),
            f"layers.{i}.feed_forward.w2.weight": matrix(width, inner),
            f"layers.{i}.attention_norm.weight": 1 + torch.randn(width) / 4,
            f"layers.{i}.ffn_norm.weight": 1 + torch.randn(width) / 4,
        }
    return weights


def released_vq(channels: int = 32, latent: int = 32, codes: int = CODES) -> dict:
    """Random weights of an image tokenizer under the released names, written out from the released layout."""
    weights = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        weights[f"{name}.bias"] = torch.randn(outputs) / 10

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + torch.randn(width) / 10, torch.randn(width) / 10

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths = [channels * multiple for multiple in (1, 1, 2, 2, 4)]
    for side, order, blocks in (("encoder", widths, 2), ("decoder", widths[::-1], 3)):
        first, last = (3, latent) if side == "encoder" else (latent, 3)
        conv(f"{side}.conv_in", first, order[0], 3)
        residual(f"{side}.mid.0", widths[-1], widths[-1])
        attention(f"{side}.mid.1", widths[-1])
        residual(f"{side}.mid.2", widths[-1], widths[-1])
        before = order[0]
        for i, width in enumerate(order):
            for j in range(blocks):
                residual(f"{side}.conv_blocks.{i}.res.{j}", before, width)
                before = width
                if i == (4 if side == "encoder" else 0):
                    attention(f"{side}.conv_blocks.{i}.attn.{j}", width)
            if i < 4:
                conv(
                    f"{side}.conv_blocks.{i}.{'downsample' if side == 'encoder' else 'upsample'}.conv", width, width, 3
                )
        norm(f"{side}.norm_out", order[-1])
        conv(f"{side}.conv_out", order[-1], last, 3)
    conv("quant_conv", latent, 8, 1)
    conv("post_quant_conv", 8, latent, 1)
    weights["quantize.embedding.weight"] = torch.randn(codes, 8)
    weights["quantize.codebook_used"] = torch.zeros(65536)
    return weights


def rotary_table(grid: int, head_dim: int) -> torch.Tensor:
    """The released table, complex [positions, D/2]: 0 for captions, then one rotation per pair of a head."""
    angles = torch.zeros(120 + grid**2, head_dim // 2, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for pair in range(head_dim // 2):
                place = row if pair < head_dim // 4 else column
                speed = 10000 ** (-2 * (pair % (head_dim // 4)) / (head_dim // 2))
                angles[120 + row * grid + column, pair] = place * speed
    is_image = (torch.arange(len(angles)) >= 120).double()[:, None]
    return torch.polar(is_image.expand_as(angles), angles)


def reference_logits(weights: dict, features: torch.Tensor, length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one row, straight from the released weights and the formulas, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def rms(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    x = features.double() @ w["cls_embedding.cap_proj.fc1.weight"].T
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    x = torch.cat([x @ w["cls_embedding.cap_proj.fc2.weight"].T, w["tok_embeddings.weight"][tokens[:-1]]])
    size, head_dim = len(x), WIDTH // HEADS
    turns = rotary_table(16, head_dim)[:size, None]
    place = torch.arange(size)
    hidden = (place[None] > place[:, None]) | (place[None] < 120 - length)
    hidden &= place[None] != place[:, None]
    for i in range(LAYERS):
        qkv = rms(x, f"layers.{i}.attention_norm.weight") @ w[f"layers.{i}.attention.wqkv.weight"].T
        query, key, value = qkv.split(WIDTH, dim=-1)
        query, key = (
            torch.view_as_real(torch.view_as_complex(part.reshape(size, HEADS, -1, 2)) * turns).flatten(2)
            for part in (query, key)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) / head_dim**0.5
        share = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", share, value.reshape(size, HEADS, -1)).flatten(1)
        x = x + attended @ w[f"layers.{i}.attention.wo.weight"].T
        y = rms(x, f"layers.{i}.ffn_norm.weight")
        gate = y @ w[f"layers.{i}.feed_forward.w1.weight"].T
        up = y @ w[f"layers.{i}.feed_forward.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"layers.{i}.feed_forward.w2.weight"].T
    return (rms(x, "norm.weight") @ w["output.weight"].T)[119:]


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    return released_gpt(), released_vq()


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """A T5 of one layer whose features are as wide as flan-t5-xl's, with a word tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "deer", "house", "on", "red", "background"]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(words), d_model=2048, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(released, text_encoder, tmp_path_factory):
    """A folder converted from files as LlamaGen's training saves them: weights beside settings and a step count."""
    folder = tmp_path_factory.mktemp("llamagen")
    torch.save({"model": released[0], "steps": 3, "args": argparse.Namespace(lr=1e-4)}, folder / "gpt.pt")
    torch.save({"model": released[1]}, folder / "vq.pt")
    convert.convert(folder / "gpt.pt", folder / "vq.pt", folder / "out", 256, text_encoder)
    return folder / "out"


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def batch():
    """Caption features [B, P, F] with zeros as padding, their mask, and all tokens of an image."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(120)[None] >= 120 - torch.tensor(LENGTHS)[:, None]
    features = torch.randn(len(LENGTHS), 120, 2048, generator=generator) * mask[..., None]
    return features, mask, torch.randint(0, CODES, (len(LENGTHS), 256), generator=generator)


@torch.no_grad()
def test_logits_equal_those_of_the_formulas_on_the_released_weights(released, model, batch):
    features, mask, tokens = batch
    prompts = encode_features(model.net, features, mask)
    ours = model.image_logits(prompts, tokens)
    assert ours.shape == (3, 256, CODES)
    for row, length in enumerate(LENGTHS):
        reference = reference_logits(released[0], features[row], length, tokens[row])
        assert (ours[row] - reference).abs().max() < 1e-4
    assert ours.std() > 1
    unconditional = model.image_logits(prompts, tokens, conditional=False)
    reference = reference_logits(released[0], released[0]["cls_embedding.uncond_embedding"], LENGTHS[1], tokens[1])
    assert (unconditional[1] - reference).abs().max() < 1e-4


@torch.no_grad()
def test_padding_may_contain_anything_or_be_left_out(model, batch):
    """Caption slots have no rotation, so a caption may use fewer than 120 of them."""
    features, mask, tokens = batch
    logits = model.image_logits(encode_features(model.net, features, mask), tokens)
    noisy = features + torch.randn_like(features) * ~mask[..., None]
    assert torch.equal(model.image_logits(encode_features(model.net, noisy, mask), tokens), logits)
    short = encode_features(model.net, features[1:, -LENGTHS[1] :], mask[1:, -LENGTHS[1] :])
    assert (model.image_logits(short, tokens[1:]) - logits[1:]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("conditional", [True, False])
def test_one_pass_equals_step_by_step(model, batch, conditional: bool):
    features, mask, tokens = batch
    prompts = encode_features(model.net, features, mask)
    embeds = prompts.embeds_BPE if conditional else prompts.unconditional_BPE
    lengths = mask.sum(1)
    packed = torch.stack([row.roll(n, 0) for row, n in zip(embeds, lengths.tolist(), strict=True)])
    decoder = decoder_of(model)
    decoder.keep([])
    hidden = [decoder.join(packed, lengths, prompts.first_B, torch.arange(3), 255)]
    hidden += [decoder.step(model.image_embeddings_VE[tokens[:, t]]) for t in range(255)]
    stepped = model.image_head(torch.stack(hidden, dim=1))
    assert (stepped - model.image_logits(prompts, tokens, conditional)).abs().max() < 1e-4


@torch.no_grad()
def test_it_draws_the_most_likely_tokens(model):
    """Greedy tokens under guidance are the most likely ones of the teacher-forced pass, for prompts of any length."""
    prompts = ["a deer", "A deer on a red background", "a house"]
    sampling = SamplingConfig(temperature=0, guidance_scale=7.5)
    tokens = draw(model, [*prompts, prompts[0]], [0] * 4, sampling)
    batch = model.encode_prompts(prompts)
    assert batch.first_B.tolist() == [117, 113, 117]
    logits = guide(model.image_logits(batch, tokens[:3]), model.image_logits(batch, tokens[:3], False), 7.5)
    assert torch.equal(tokens[:3], logits.argmax(-1))
    assert torch.equal(tokens[0], tokens[3])
    assert not torch.equal(tokens[0], tokens[2])
    assert model.decode_pixels(tokens[:1]).shape == (1, 256, 256, 3)
    with pytest.raises(ValueError, match="cannot caption images"):
        model.caption(np.zeros((1, 256, 256, 3), np.uint8))


@torch.no_grad()
def test_prompts_are_cleaned_captions_without_control(model, folder):
    plain = model.encode_prompts(["a deer on red background"])
    for prompt in (
        "A deer (on red) background",
        "a deer/on [red] background\u4e2d",
        "<b>A deer</b> on red & background",
    ):
        assert torch.equal(model.encode_prompts([prompt]).embeds_BPE, plain.embeds_BPE)
    (length,) = model.encode_prompts(["a deer \\n house"]).mask_BP.sum(1).tolist()
    assert length == 4, "three words and the end"
    for check in (model.encode_prompts, model.check_prompts):
        with pytest.raises(UserError, match=r"nothing is left of prompt '.*' when it is cleaned .*: write it in words"):
            check(["a deer", "\u4e2d\u6587"])
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.json")]
    assert folder_revision(folder) == model.revision != files_revision(folder, files), "0.1.0 sent other captions"


def test_a_converted_folder_names_its_dtype(folder):
    assert model_dtype(folder) == "bfloat16"
    loaded = load_model(str(folder), device="cpu")
    assert loaded.shape.prompt_tokens == 120  # the longest caption
    assert loaded.image_head.weight.dtype == torch.bfloat16
    assert draw(loaded, ["a deer"], [1], SamplingConfig()).shape == (1, 256)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "gpt.safetensors").unlink(), r"has no gpt\.safetensors"),
        (lambda folder: (folder / "text_encoder/tokenizer.json").unlink(), "has no text_encoder/tokenizer.json or"),
        (lambda folder: (folder / "vq.safetensors").write_bytes(b"{"), r"vq\.safetensors is cut off or damaged"),
        (lambda folder: (folder / "text_encoder/model.safetensors").write_bytes(b""), "is cut off or damaged"),
        (
            lambda folder: save_file({"x": torch.zeros(1)}, folder / "text_encoder/model.safetensors"),
            "missing .*encoder",
        ),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llamagen", "gpt": {}}'), "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError, match=message):
        load_model(str(copy), device="cpu")


def test_an_erasure_needs_a_captioner(folder, tmp_path):
    settings = {"concept": "violence", "base": str(folder), "store": str(tmp_path)}
    judged = EvalConfig(judge=(str(judge_folder()),))
    with pytest.raises(ValueError, match="cannot describe images: set a captioner"):
        open_run(settings | {"evaluation": judged})
    run = open_run(settings | {"evaluation": judged, "captioner": EMBEDDED})
    assert run.config.sampling.guidance_scale == 7.5
    assert run.config.sampling.top_k == 1000


def test_a_bfloat16_base_is_trained_in_float32(folder, released):
    model = load_model(str(folder), device="cpu")
    add_lora(model.net, rank=2, alpha=4)
    trained = [weight for weight in model.net.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (torch.randint(0, CODES, (2, 256), generator=generator) for _ in range(2))
    prompts = ["a deer", "a deer on a red background"]
    before = reference_log_probs(model, prompts, False, chosen, rejected)
    batch = PairBatch(prompts, [False] * 2, torch.arange(2), chosen, rejected, *before)
    optimizer, targets = torch.optim.AdamW(trained, lr=1e-2), Targets(model, nullcontext)
    objective, margins = objective_for(VSafeDPOConfig()), []
    for step in range(3):
        loss, figures = objective.loss(model, targets, VSafeDPOBatch(batch, None, None), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margins.append(figures["margin"])
    assert margins[0] == 0
    assert margins[-1] > 0.05


def test_every_matrix_of_the_layers_gets_a_lora(folder, batch):
    model = load_model(str(folder), device="cpu", dtype="float32")
    features, mask, tokens = batch
    prompts = encode_features(model.net, features, mask)
    with torch.no_grad():
        before = model.image_logits(prompts, tokens)
        add_lora(model.net, rank=2, alpha=4)
        assert torch.equal(model.image_logits(prompts, tokens), before)
    trained = [name for name, weight in model.net.named_parameters() if weight.requires_grad]
    assert len(trained) == LAYERS * 7 * 2
    assert model.language_model.layers[1].self_attn.q_proj.lora_A is not None


def test_rotary_table_of_both_sizes():
    for grid, head_dim in ((16, 64), (32, 100)):
        cos, sin = gpt.GridRotary(grid, head_dim)(torch.zeros(()), torch.arange(120 + grid**2)[None])
        table = rotary_table(grid, head_dim)
        assert (torch.complex(cos, sin)[0] - table.repeat(1, 2)).abs().max() < 1e-5


def test_the_full_xl_and_its_tokenizer_are_accepted():
    with torch.device("meta"):
        weights, vq_weights = released_gpt(36, 1280, 3584, 16384), released_vq(128, 256, 16384)
        config, state = convert.convert_gpt(weights, 512, "t2i_XL_stage2_512.pt")
        net = gpt.LlamaGenGPT(config)
    assert config == gpt.GPTConfig(36, 20, 1280, 16384, 512)
    net.load_state_dict(state, strict=True, assign=True)
    assert len(weights) == 6 + 36 * 7
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6) == 775 + 3  # + the caption projection
    assert convert.check_vq(vq_weights, "vq_ds16_t2i.pt") == vq.VQConfig(128, 256, 16384, 8)
    assert len(vq_weights) == 344


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.attention.wo.weight": None}, r"layers.1.attention.wo.weight is missing, expected \[64, 64\]"),
        ({"layers.0.attention.bias": torch.zeros(3)}, r"layers.0.attention.bias of \[3\] is not expected"),
        ({"output.weight": torch.zeros(100, 64)}, r"output.weight is \[100, 64\], expected \[128, 64\]"),
        ({"tok_embeddings.weight": None}, "tok_embeddings.weight is missing"),
        ({"layers.2.ffn_norm.weight": torch.zeros(64)}, "3 layers of width 64, expected one of B: 12 of width 768"),
        ({"freqs_cis": torch.zeros(120 + 1024, 8, 2)}, r"freqs_cis is \[1144, 8, 2\], expected \[376, 8, 2\]"),
        ({"freqs_cis": torch.zeros(376, 8, 2)}, "freqs_cis is not the rotary table of 256 px images"),
    ],
)
def test_mismatched_gpt_weights_are_listed(released, change, message):
    weights = {name: tensor for name, tensor in (released[0] | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert.convert_gpt(weights, 256, "gpt.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize.codebook_used": None}, r"quantize.codebook_used is missing, expected \[65536\]"),
        ({"decoder.conv_blocks.4.upsample.conv.bias": torch.zeros(32)}, "upsample.conv.bias of .* is not expected"),
        ({"encoder.mid.1.q.weight": torch.zeros(1)}, r"encoder.mid.1.q.weight is \[1\], expected \[128, 128, 1, 1\]"),
        ({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, "8 channels cannot be divided into 32 groups"),
    ],
)
def test_mismatched_tokenizer_weights_are_listed(released, change, message):
    weights = {name: tensor for name, tensor in (released[1] | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert.check_vq(weights, "vq.pt")


def test_the_rotary_table_in_a_checkpoint_is_dropped(released):
    table = torch.view_as_real(rotary_table(16, WIDTH // HEADS)).bfloat16()
    state = convert.convert_gpt(released[0] | {"freqs_cis": table}, 256, "gpt.pt")[1]
    assert state.keys() == convert.convert_gpt(released[0], 256, "gpt.pt")[1].keys()


@pytest.mark.parametrize("wrap", [lambda w: {"module": w}, lambda w: {"state_dict": w}, lambda w: w])
def test_checkpoints_may_be_wrapped(tmp_path, wrap):
    weights = {"norm.weight": torch.ones(3)}
    torch.save(wrap(weights), tmp_path / "gpt.pt")
    assert torch.equal(convert.read_checkpoint(tmp_path / "gpt.pt")["norm.weight"], torch.ones(3))


def test_files_that_are_not_checkpoints_are_rejected(tmp_path, folder):
    with pytest.raises(ValueError, match=r"gpt\.pt does not exist"):
        convert.read_checkpoint(tmp_path / "gpt.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        convert.read_checkpoint(tmp_path / "text.pt")
    torch.save({"model": SimpleNamespace()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        convert.read_checkpoint(tmp_path / "code.pt")
    torch.save({"model": {"norm.weight": 3}}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match=r"norm\.weight is of type int"):
        convert.read_checkpoint(tmp_path / "number.pt")
    with pytest.raises(ValueError, match=r"config\.json, gpt\.safetensors, vq\.safetensors, text_encoder missing"):
        convert.load_folder(tmp_path)


def test_a_tokenizer_with_another_vocabulary_is_rejected(tmp_path, released):
    torch.save(released[0], tmp_path / "gpt.pt")
    torch.save(released_vq(codes=64), tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"64 codes, .* draws 128"):
        convert.convert(tmp_path / "gpt.pt", tmp_path / "vq.pt", tmp_path / "out", 256, "never read")


def test_the_command_line_takes_the_size_from_the_file_name(tmp_path, released, text_encoder, capsys):
    torch.save(released[0], tmp_path / "t2i_stage2_512.pt")
    torch.save(released[1], tmp_path / "vq.pt")
    options = ["--vq", str(tmp_path / "vq.pt"), "--out", str(tmp_path / "out"), "--text-encoder", text_encoder]
    assert main(["convert", str(tmp_path / "t2i_stage2_512.pt"), *options]) == 0
    assert convert.load_folder(tmp_path / "out")[0].config.num_image_tokens == 1024
    assert main(["convert", str(tmp_path / "vq.pt"), *options]) == 2
    assert "give --image-size" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "vq.pt"), "--out", str(tmp_path / "out")]) == 2
    assert "for LlamaGen's GPT give --vq too" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), *options]) == 2
    assert "are for LlamaGen" in capsys.readouterr().err


@pytest.mark.parametrize("grid", [16, 32])
def test_tokens_are_decoded_to_images_of_both_sizes(model, grid: int):
    tokens = torch.randint(0, CODES, (1, grid**2), generator=torch.Generator().manual_seed(grid))
    images = model.image_tokenizer.decode_pixels(tokens)
    assert images.shape == (1, 16 * grid, 16 * grid, 3)
    assert images.dtype == np.uint8
    assert images.std() > 1


@torch.no_grad()
def test_the_tokenizer_equals_that_of_janus(model, released):
    """Janus uses LlamaGen's tokenizer, whose weights transformers names differently."""
    settings = {"channel_multiplier": [1, 1, 2, 2, 4], "base_channels": 32, "latent_channels": 32, "num_patches": 4}
    janus: Any = JanusVQVAE(JanusVQVAEConfig(num_embeddings=CODES, embed_dim=8, double_latent=False, **settings)).eval()
    names = {"encoder.conv_blocks": "encoder.down", "decoder.conv_blocks": "decoder.up", ".res.": ".block."}
    names |= {".mid.0.": ".mid.block_1.", ".mid.1.": ".mid.attn_1.", ".mid.2.": ".mid.block_2."}
    weights = {name: tensor for name, tensor in released[1].items() if name != "quantize.codebook_used"}
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    janus.load_state_dict(weights)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = model.image_tokenizer.quant_conv(model.image_tokenizer.encoder(pixels))
    assert (latents - janus.quant_conv(janus.encoder(pixels))).abs().max() < 1e-4
    tokens = torch.arange(16)[None]
    theirs = ((janus.decode(tokens).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert np.abs(model.image_tokenizer.decode_pixels(tokens) - theirs.numpy()).max() < 0.51


def test_images_are_encoded_as_tokens(model, released):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    tokens = model.image_tokenizer.encode_pixels(images)
    assert tokens.shape == (2, 16)
    assert tokens.dtype == torch.int64
    assert model.image_tokenizer.decode_pixels(tokens).shape == images.shape
    codes = torch.nn.functional.normalize(released[1]["quantize.embedding.weight"], dim=-1)
    latents = 3 * codes[:16].T.reshape(1, 8, 4, 4)  # a latent's length does not matter
    assert model.image_tokenizer.quantize.nearest(latents)[0].tolist() == list(range(16))
    with pytest.raises(ValueError, match="60 x 64 pixels"):
        model.image_tokenizer.encode_pixels(images[:, :60])
    with pytest.raises(ValueError, match="15 image tokens"):
        model.image_tokenizer.decode_pixels(tokens[:, :15])
