"""Convert a Janus in DeepSeek's own format, `model_type: multi_modality`, to that of transformers.

    vce-ray convert deepseek-ai/Janus-Pro-7B --out janus-pro-7b

No code of the checkpoint is run, and of a pickle only tensors are read. The weights are mapped into memory and written
in parts of SHARD_BYTES, so a conversion needs memory for a few parts, whatever the size of the model. All names and
shapes are checked: a checkpoint that does not match is refused, never converted in part.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusConfig
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from vce_ray.errors import UserError, cut, quote
from vce_ray.models.check import INDEX
from vce_ray.models.checkpoint import AUTO, STORED, config_dtype
from vce_ray.models.folder import BASE, CONFIG, Kind, base_config, model_folder
from vce_ray.models.llamagen.vq import USAGE_WINDOW
from vce_ray.models.multi_modality_processor import make_processor
from vce_ray.models.released import Shapes, check, read_shards
from vce_ray.models.stored import free_space

MODEL_TYPE = "multi_modality"
SOURCE = Kind("checkpoint", CONFIG, "a Janus in DeepSeek's format", (*BASE.patterns, "*.bin"))
SHARD_BYTES = 1_000_000_000

VISION_TOWERS: dict[str, dict[str, int]] = {
    "siglip_large_patch16_384": {
        "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "mlp_ratio": 4, "patch_size": 16,
    },
}  # fmt: skip
"""Sizes that the name of a vision tower stands for, as transformers calls them: no file of a checkpoint has them."""
IMAGE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "VQ-16": {
        "base_channels": 128, "latent_channels": 256, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2,
    },
}  # fmt: skip
"""The same for image tokenizers."""
CLASSES = {
    "vision": "CLIPVisionTower", "aligner": "MlpProjector", "gen_vision": "VQ", "gen_aligner": "MlpProjector",
    "gen_head": "vision_head",
}  # fmt: skip
"""What the name of the class of each part contains."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "vision": {
        "image_size": 336, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -2,
    },
    "aligner": {"depth": 1, "input_dim": None, "n_embed": None, "projector_type": None},
    "gen_vision": {"image_token_size": None, "n_embed": None},
    "gen_aligner": {"depth": 1, "input_dim": None, "n_embed": None, "projector_type": None},
    "gen_head": {"image_token_embed": None, "image_token_size": None, "n_embed": None},
}  # fmt: skip
"""The parameters of each part with the defaults of DeepSeek's code; None: it has none."""
TEXTS = ("model_name", "select_feature", "projector_type")
"""Parameters that are texts; all others are integers."""
FIXED = {"projector_type": "mlp_gelu", "select_feature": "same"}
"""Parameters of which one value is supported, that of all released models."""

NAMES = (
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.vision_model\.embeddings\.position_embedding\.weight", "vision_model.vision_tower.pos_embed"),
    (r"^model\.vision_model\.embeddings\.patch_embedding", "vision_model.vision_tower.patch_embed.proj"),
    (r"^model\.vision_model\.post_layernorm", "vision_model.vision_tower.norm"),
    (r"^model\.vision_model\.encoder\.layers", "vision_model.vision_tower.blocks"),
    (r"(\.blocks\.\d+)\.layer_norm", r"\1.norm"),
    (r"(\.blocks\.\d+)\.self_attn\.[qkv]_proj", r"\1.attn.qkv"),
    (r"(\.blocks\.\d+)\.self_attn\.projection_layer", r"\1.attn.proj"),
    (r"^model\.vqmodel", "gen_vision_model"),
    (r"^(gen_vision_model\.\w+)\.(?:down|up)\.(\d+)", r"\1.conv_blocks.\2"),
    (r"(\.conv_blocks\.\d+)\.block", r"\1.res"),
    (r"\.mid\.block_1", ".mid.0"),
    (r"\.mid\.attn_1", ".mid.1"),
    (r"\.mid\.block_2", ".mid.2"),
    (r"^model\.generation_embeddings", "gen_embed"),
    (r"^model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
    (r"^model\.generation_head", "gen_head"),
    (r"^model\.generation_aligner", "gen_aligner"),
    (r"^model\.aligner", "aligner"),
    (r"aligner\.fc1", "aligner.layers.0"),
)
"""Parts of names in transformers, as patterns, and what DeepSeek calls them. Applied in this order."""


def convert(ref: str, out: Path) -> None:
    """Write the checkpoint, as transformers' Janus, to `out`; config.json last, so a folder that has it is complete.

    Args:
        ref: the checkpoint in DeepSeek's format: a folder, 's3://bucket/folder' or a hub id.

    Raises:
        UserError: it is not one, a file or tensor is missing, unknown, damaged or of another shape, or it names a part
            whose sizes are not known.
        StoreError: the object store cannot be reached.
    """
    folder = model_folder(ref, SOURCE)
    settings = base_config(str(folder))
    if settings.get("model_type") != MODEL_TYPE:
        raise UserError(f"{CONFIG} of {ref} has model_type {quote(settings.get('model_type'))}, not {MODEL_TYPE!r}")
    processor = make_processor(folder)
    config = janus_config(settings, processor.tokenizer, ref)
    with torch.device("meta"):
        net = JanusForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    weights = read_shards(folder)
    expected = released_shapes(shapes)
    unused = {name: shape for name, shape in unused_shapes(config).items() if name in weights}
    check(weights, expected | unused, ref)
    config.dtype = _dtype(settings, weights, ref)
    needed = sum(weights[name].nbytes for name in expected)
    if needed > free_space(out):
        raise UserError(
            f"{ref} needs {needed / 1e9:.2f} GB, the disk of {out} has {free_space(out) / 1e9:.2f} GB free",
            "free some, or give --out on another disk",
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).unlink(missing_ok=True)
    _write_weights(weights, shapes, out)
    processor.save_pretrained(out)
    tokens = {key: getattr(config.text_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    begin = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.boi_token)
    # transformers' own loop reads this key
    GenerationConfig(**tokens, generation_kwargs={"boi_token_id": begin}, guidance_scale=5.0).save_pretrained(out)
    config.save_pretrained(out)


def janus_config(settings: Mapping[str, Any], tokenizer: Any, ref: str) -> JanusConfig:
    """Return the config of transformers for a config.json of DeepSeek's.

    Raises:
        UserError: a part or parameter is missing, not known, or does not fit the others.
    """
    parts = {name: _part(settings, name, ref) for name in PARAMETERS}
    vision, aligner, gen_vision, gen_aligner, gen_head = (parts[name] for name in PARAMETERS)
    tower = _known(VISION_TOWERS, vision["model_name"], "vision tower", ref)
    image_tokenizer = _known(IMAGE_TOKENIZERS, settings["gen_vision_config"].get("cls"), "image tokenizer", ref)
    language = settings.get("language_config")
    if not isinstance(language, dict):
        raise UserError(f"{CONFIG} of {ref} has no language_config: give {SOURCE.format}")
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {key: value for key, value in language.items() if not key.startswith("_") and key != "torch_dtype"}
    try:
        text = LlamaConfig(**sizes | tokens)
    except Exception as error:  # transformers raises no more specific type
        raise UserError(f"language_config in {CONFIG} of {ref} cannot be used ({cut(str(error))})") from error
    layers, chosen = tower["num_hidden_layers"], vision["select_layer"]
    widths = {
        "vision_config": (tower["hidden_size"], aligner["input_dim"]),
        "aligner_config": (aligner["n_embed"], text.hidden_size),
        "gen_vision_config": (gen_vision["n_embed"], gen_aligner["input_dim"]),
        "gen_aligner_config": (gen_aligner["n_embed"], text.hidden_size),
        "gen_head_config": (gen_head["n_embed"], text.hidden_size),
        "image_token_embed": (gen_head["image_token_embed"], text.hidden_size),
        "image_token_size": (gen_head["image_token_size"], gen_vision["image_token_size"]),
    }
    for name, (found, wanted) in widths.items():
        if found != wanted:
            raise UserError(f"{CONFIG} of {ref}: {name} gives {found} where the next part takes {wanted}")
    size, patch = vision["image_size"], tower["patch_size"]
    return JanusConfig(
        architectures=[JanusForConditionalGeneration.__name__],
        text_config=text.to_dict(),
        vision_config=tower | {
            "num_hidden_layers": min(layers, layers + chosen + 1 if chosen <= 0 else chosen),
            "image_size": size,
            "num_image_tokens": (size // patch) ** 2,
            "projection_dim": aligner["n_embed"],
            "depth": aligner["depth"],
        },
        vq_config=image_tokenizer | {
            "embed_dim": gen_vision["n_embed"],
            "num_embeddings": gen_vision["image_token_size"],
            "projection_dim": gen_aligner["n_embed"],
            "num_hidden_layers": gen_aligner["depth"],
            "image_token_embed_dim": gen_head["image_token_embed"],
        },
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        tie_word_embeddings=text.tie_word_embeddings,  # transformers' default would replace the language model's head
    )  # fmt: skip


def released_name(name: str) -> str:
    """Return DeepSeek's name of a tensor of transformers' Janus: the same one for queries, keys and values."""
    for pattern, released in NAMES:
        name = re.sub(pattern, released, name)
    # activations are layers too in DeepSeek's aligners
    return re.sub(r"aligner\.hidden_layers\.(\d+)", lambda found: f"aligner.layers.{2 * int(found[1]) + 2}", name)


def released_shapes(shapes: Shapes) -> Shapes:
    """Return name and shape of each tensor in DeepSeek's format from those in transformers'."""
    released: Shapes = {}
    for name, shape in shapes.items():
        theirs = released_name(name)
        if ".attn.qkv." in theirs:
            shape = (3 * shape[0], *shape[1:])
        released[theirs] = (1, *shape) if theirs.endswith("pos_embed") else shape
    return released


def unused_shapes(config: JanusConfig) -> Shapes:
    """Return name and shape of the tensors that neither drawing nor reading needs, and which a checkpoint may have: the
    pooling head of the vision tower, and which codes the image tokenizer had last used in training."""
    vision: Any = config.vision_config
    width, inner = vision.hidden_size, int(vision.hidden_size * vision.mlp_ratio)
    pool: Shapes = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, outputs, inputs in (
        ("q", width, width), ("kv", 2 * width, width), ("proj", width, width),
        ("mlp.fc1", inner, width), ("mlp.fc2", width, inner),
    ):  # fmt: skip
        pool |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    pool = {f"vision_model.vision_tower.attn_pool.{name}": shape for name, shape in pool.items()}
    return pool | {"gen_vision_model.quantize.codebook_used": (USAGE_WINDOW,)}


def _part(settings: Mapping[str, Any], name: str, ref: str) -> dict[str, Any]:
    """Return the parameters of a part, with defaults for those that are left out."""
    part = settings.get(f"{name}_config")
    if not isinstance(part, dict) or not isinstance(part.get("params"), dict):
        raise UserError(f"{CONFIG} of {ref} has no {name}_config with params: give {SOURCE.format}")
    if CLASSES[name] not in str(part.get("cls")):
        raise UserError(f"{CONFIG} of {ref}: {name}_config has cls {quote(part.get('cls'))}, not {CLASSES[name]!r}")
    given, known = part["params"], PARAMETERS[name]
    if other := sorted(key for key, value in given.items() if key not in known and value):
        raise UserError(
            f"{CONFIG} of {ref}: {name}_config has {other[0]}, which is not known: known are {', '.join(known)}"
        )
    parameters = known | {key: given[key] for key in known if key in given}
    wrong = [key for key, value in parameters.items() if type(value) is not (str if key in TEXTS else int)]
    if wrong:
        raise UserError(f"{CONFIG} of {ref}: {name}_config has no usable {', '.join(wrong)}: download it again")
    for key, value in FIXED.items():
        if parameters.get(key, value) != value:
            raise UserError(f"{CONFIG} of {ref}: {name}_config has {key} {quote(parameters[key])}, not {value!r}")
    return parameters


def _known(table: Mapping[str, dict[str, Any]], name: object, what: str, ref: str) -> dict[str, Any]:
    if name not in table:
        raise UserError(f"{CONFIG} of {ref} names the {what} {quote(name)}: known are {', '.join(table)}")
    return table[str(name)]


def _dtype(settings: Mapping[str, Any], weights: Mapping[str, Tensor], ref: str) -> str:
    """Return the dtype that the config names, or else that of most weights."""
    sizes: Counter[str] = Counter()
    for tensor in weights.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    named = config_dtype(dict(settings))
    dtype = sizes.most_common(1)[0][0] if named == AUTO else named
    if dtype not in STORED.values():
        raise UserError(f"{ref} has the dtype {quote(dtype)}: known are {', '.join(STORED.values())}")
    return dtype


def _write_weights(weights: Mapping[str, Tensor], names: Iterable[str], out: Path) -> None:
    """Write the tensors under transformers' names, in parts, with their index if there are several."""
    parts: list[list[str]] = [[]]
    size = total = 0
    for name in names:
        added = _tensor(weights, name).nbytes
        if parts[-1] and size + added > SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size, total = size + added, total + added
    files = {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}
    if len(parts) == 1:
        files = {"model.safetensors": parts[0]}
    for file, part in files.items():
        # cloned, because safetensors refuses tensors that share memory, as the parts of qkv do
        state = {name: _tensor(weights, name).clone(memory_format=torch.contiguous_format) for name in part}
        save_file(state, out / file, {"format": "pt"})
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, part in files.items() for name in part},
        }
        (out / f"model{INDEX}").write_text(json.dumps(index, indent=2) + "\n")


def _tensor(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor by its name in transformers."""
    released = released_name(name)
    tensor = weights[released]
    if ".attn.qkv." in released:
        part = re.search(r"\.([qkv])_proj\.", name)
        assert part is not None
        return tensor.chunk(3)["qkv".index(part[1])]
    return tensor[0] if released.endswith("pos_embed") else tensor
