"""Convert LlamaGen's released weights into a folder that this package loads, and load such a folder.

    vce-ray convert t2i_XL_stage1_256.pt --vq vq_ds16_t2i.pt --out folder

The folder also gets the encoder of flan-t5-xl, which encodes the captions, and so has everything that sampling needs.
All keys and shapes are checked: weights that do not match are rejected, never loaded in part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from vce_ray.errors import UserError
from vce_ray.models.llamagen import gpt, vq
from vce_ray.models.released import Shapes, check, read_checkpoint

CONFIG, GPT_WEIGHTS, VQ_WEIGHTS, TEXT_ENCODER = "config.json", "gpt.safetensors", "vq.safetensors", "text_encoder"
FLAN_T5 = "google/flan-t5-xl"
DTYPE = "bfloat16"
"""Dtype that the text encoder is stored in and the GPT is loaded in: the one LlamaGen samples in."""
MODEL_TYPE = "llamagen"

NAMES = {
    "tok_embeddings.weight": "language_model.embed_tokens.weight",
    "norm.weight": "language_model.norm.weight",
    "output.weight": "generation_head.weight",
    "cls_embedding.uncond_embedding": "uncond_embedding",
    "cls_embedding.cap_proj.fc1.weight": "caption_projection.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "caption_projection.fc2.weight",
}
"""Our name of each released weight outside the layers."""
LAYER_NAMES = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
"""Our name of each released weight of a layer; `attention.wqkv.weight` is also split into three."""
ROTARY_TABLE = "freqs_cis"
"""The one optional tensor: LlamaGen's own serving code drops it from checkpoints that have it."""


def convert(
    gpt_path: Path, vq_path: Path, out: Path, image_size: int | None = None, text_encoder: str = FLAN_T5
) -> None:
    """Write config.json, gpt.safetensors, vq.safetensors and text_encoder/ to `out`.

    Args:
        image_size: height and width in pixels of the images the GPT was trained on; its weights do not tell. By
            default, the one in which the name of its file ends.
        text_encoder: the T5 whose features the GPT was trained on: a hub id, or a folder in transformers' format.

    Raises:
        UserError: a file is not a checkpoint, a key is missing, unknown or of another shape, or the text encoder's
            features have another width.
    """
    named = re.search(r"_(256|512)\.pt$", gpt_path.name)
    image_size = image_size or (int(named[1]) if named else None)
    if image_size is None:
        raise UserError(f"{gpt_path.name} does not end in _256.pt or _512.pt: give --image-size")
    gpt_config, gpt_state = convert_gpt(read_checkpoint(gpt_path), image_size, str(gpt_path))
    vq_weights = read_checkpoint(vq_path)
    vq_config = check_vq(vq_weights, str(vq_path))
    if vq_config.codebook_size != gpt_config.vocab_size:
        raise UserError(
            f"{vq_path} has {vq_config.codebook_size} codes, {gpt_path} draws {gpt_config.vocab_size}: "
            "give the tokenizer the GPT was trained with"
        )
    encoder: Any = T5EncoderModel.from_pretrained(text_encoder, dtype=getattr(torch, DTYPE))
    if encoder.config.d_model != gpt.CAPTION_WIDTH:
        raise UserError(
            f"{text_encoder} gives features of width {encoder.config.d_model}, {gpt_path} reads {gpt.CAPTION_WIDTH}: "
            "give the T5 the GPT was trained with"
        )
    out.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(out / TEXT_ENCODER)
    AutoTokenizer.from_pretrained(text_encoder).save_pretrained(out / TEXT_ENCODER)
    for state, name in ((gpt_state, GPT_WEIGHTS), (vq_weights, VQ_WEIGHTS)):
        # cloned, because safetensors refuses tensors that share memory, as the parts of wqkv do
        save_file(
            {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}, out / name
        )
    card = {"model_type": MODEL_TYPE, "dtype": DTYPE, "gpt": asdict(gpt_config), "vq": asdict(vq_config)}
    (out / CONFIG).write_text(json.dumps(card, indent=2) + "\n")  # written last: a folder that has it is complete


def load_folder(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[gpt.LlamaGenGPT, vq.VQModel]:
    """Load the GPT in `dtype`, and the image tokenizer in float32, the dtype it is released and trained in.

    Raises:
        UserError: the folder was not written by `convert`, or its weights do not match its config.json.
    """
    absent = [name for name in (CONFIG, GPT_WEIGHTS, VQ_WEIGHTS, TEXT_ENCODER) if not (folder / name).exists()]
    if absent:
        raise UserError(f"{folder} is not a converted LlamaGen: {', '.join(absent)} missing")
    card = json.loads((folder / CONFIG).read_text())
    if card.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder / CONFIG}: model_type is {card.get('model_type')!r}, expected {MODEL_TYPE!r}")
    try:
        gpt_config, vq_config = gpt.GPTConfig(**card["gpt"]), vq.VQConfig(**card["vq"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({type(error).__name__}: {error}): convert again") from error
    with torch.device("meta"):  # no memory and no initialization for weights that are replaced at once
        gpt_net, vq_net = gpt.LlamaGenGPT(gpt_config), vq.VQModel(vq_config)
    _fill(gpt_net, folder / GPT_WEIGHTS)
    _fill(vq_net, folder / VQ_WEIGHTS)
    vq_net.to(device, torch.float32).requires_grad_(False)
    for weight in vq_net.parameters():
        if weight.dim() == 4:  # makes convolutions faster on CPUs, as in Janus
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return gpt_net.to(device, dtype).eval(), vq_net.eval()


def convert_gpt(weights: Mapping[str, Tensor], image_size: int, source: str) -> tuple[gpt.GPTConfig, dict[str, Tensor]]:
    """Return the config of released weights, and the weights under our names.

    `wqkv` is split. The rotary embedding of the released model pairs neighbouring rows of queries and keys, while a
    Llama pairs row i with row i + D/2. The rows of each head are permuted accordingly, which changes no inner product.

    Args:
        source: name of the weights in error messages.

    Raises:
        UserError: a key is missing, unknown or of another shape, or the size is not one of LlamaGen's.
    """
    config = _gpt_config(weights, image_size, source)
    check(_without_table(weights, config, source), released_shapes(config), source)
    state = {ours: weights[released] for released, ours in NAMES.items()}
    for layer in range(config.layers):
        before, after = f"layers.{layer}.", f"language_model.layers.{layer}."
        state |= {after + ours: weights[before + released] for released, ours in LAYER_NAMES.items()}
        query, key, value = weights[before + "attention.wqkv.weight"].chunk(3)
        state[after + "self_attn.q_proj.weight"] = halves(query, config.head_dim)
        state[after + "self_attn.k_proj.weight"] = halves(key, config.head_dim)
        state[after + "self_attn.v_proj.weight"] = value
    return config, state


def halves(weight_EE: Tensor, head_dim: int) -> Tensor:
    """Permute the rows of each head from neighbouring pairs to halves: 0 1 2 3 4 5 becomes 0 2 4 1 3 5."""
    return weight_EE.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def released_shapes(config: gpt.GPTConfig) -> Shapes:
    """Return name and shape of every released weight of a GPT."""
    width, inner = config.width, config.feed_forward_width
    shapes: Shapes = {
        "tok_embeddings.weight": (config.vocab_size, width),
        "norm.weight": (width,),
        "output.weight": (config.vocab_size, width),
        "cls_embedding.uncond_embedding": (gpt.CAPTION_SLOTS, gpt.CAPTION_WIDTH),
        "cls_embedding.cap_proj.fc1.weight": (width, gpt.CAPTION_WIDTH),
        "cls_embedding.cap_proj.fc2.weight": (width, width),
    }
    layer: Shapes = {
        "attention.wqkv.weight": (3 * width, width),
        "attention.wo.weight": (width, width),
        "feed_forward.w1.weight": (inner, width),
        "feed_forward.w2.weight": (width, inner),
        "feed_forward.w3.weight": (inner, width),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }
    return shapes | {f"layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()}


def check_vq(weights: Mapping[str, Tensor], source: str) -> vq.VQConfig:
    """Return the config of an image tokenizer's released weights, whose names we keep.

    Raises:
        UserError: a key is missing, unknown or of another shape.
    """
    channels = _shape(weights, "encoder.conv_in.weight", 4, source)[0]
    latent_channels = _shape(weights, "encoder.conv_out.weight", 4, source)[0]
    codebook_size, code_width = _shape(weights, "quantize.embedding.weight", 2, source)
    if channels % vq.NORM_GROUPS:
        raise UserError(f"{source}: {channels} channels cannot be divided into {vq.NORM_GROUPS} groups")
    config = vq.VQConfig(channels, latent_channels, codebook_size, code_width)
    with torch.device("meta"):
        expected = vq.VQModel(config).state_dict()
    check(weights, {key: tuple(tensor.shape) for key, tensor in expected.items()}, source)
    return config


def _gpt_config(weights: Mapping[str, Tensor], image_size: int, source: str) -> gpt.GPTConfig:
    if image_size not in gpt.IMAGE_SIZES:
        raise UserError(f"image size {image_size}: expected one of {gpt.IMAGE_SIZES}")
    vocab_size, width = _shape(weights, "tok_embeddings.weight", 2, source)
    layers = len({match[1] for key in weights if (match := re.match(r"layers\.(\d+)\.", key))})
    for size_layers, heads, size_width in gpt.SIZES.values():
        if (layers, width) == (size_layers, size_width):
            return gpt.GPTConfig(layers, heads, width, vocab_size, image_size)
    known = ", ".join(f"{name}: {size[0]} of width {size[2]}" for name, size in gpt.SIZES.items())
    raise UserError(f"{source} has {layers} layers of width {width}, expected one of {known}")


def _without_table(weights: Mapping[str, Tensor], config: gpt.GPTConfig, source: str) -> Mapping[str, Tensor]:
    """Return the weights without the rotary table, after checking that it equals the one computed here."""
    if ROTARY_TABLE not in weights:
        return weights
    positions = torch.arange(gpt.CAPTION_SLOTS + config.num_image_tokens)[None]
    half = config.head_dim // 2
    parts = gpt.GridRotary(config.grid, config.head_dim)(torch.zeros(()), positions)
    ours = torch.stack([part[0, :, :half] for part in parts], dim=-1)
    found = weights[ROTARY_TABLE]
    check({ROTARY_TABLE: found}, {ROTARY_TABLE: tuple(ours.shape)}, source)
    if not torch.allclose(found.float(), ours, atol=0.01):  # tolerance for half precision
        raise UserError(f"{source}: {ROTARY_TABLE} is not the rotary table of {config.image_size} px images")
    return {key: tensor for key, tensor in weights.items() if key != ROTARY_TABLE}


def _shape(weights: Mapping[str, Tensor], key: str, dims: int, source: str) -> list[int]:
    """Return the shape of a weight that the config is derived from."""
    if key not in weights:
        raise UserError(f"{source} does not match: {key} is missing; it starts with {', '.join(list(weights)[:3])}")
    if weights[key].dim() != dims:
        raise UserError(f"{source} does not match: {key} is {list(weights[key].shape)}, expected {dims} dimensions")
    return list(weights[key].shape)


def _fill(net: nn.Module, path: Path) -> None:
    state = load_file(path)
    check(state, {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}, str(path))
    net.load_state_dict(state, assign=True)
