"""A small Janus with random weights in DeepSeek's own format, and the modules that its weights belong to.

The modules are those that DeepSeek builds a Janus of, from elsewhere: timm's vision transformer, transformers' Llama,
LlamaGen's image tokenizer, and linear layers. None is transformers' Janus, so what it computes is an independent check.

Where the format is from:
- config.json (tests/data/janus/README.md), tokenizer_config.json, special_tokens_map.json, processor_config.json and
  preprocessor_config.json: deepseek-ai/Janus-Pro-7B and its copies on the Hugging Face hub, with smaller sizes;
- names of tensors: modeling_vlm.py, siglip_vit.py, vq_model.py and projector.py of github.com/deepseek-ai/Janus;
- token ids: config.json of deepseek-community/Janus-Pro-1B has 100000, 100001, 100002 and 100581; 100016 and 100593 are
  those that a port of Janus-1.3B names. The ids of the roles were not to be found: they are made up, and so are the
  words, cut in the manner of DeepSeek's tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vce_ray.config import EMBEDDED
from vce_ray.models import multi_modality
from vce_ray.models.folder import model_folder
from vce_ray.models.llamagen.vq import VQConfig, VQModel

BOS, EOS, PAD = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
)
BEGIN, END, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
IDS = {BOS: 100_000, EOS: 100_001, PAD: 100_002, BEGIN: 100_016, IMAGE: 100_581, END: 100_593}
ROLE_IDS = {USER: 100_594, ASSISTANT: 100_595}
VOCABULARY = 102_400
WIDTH, LAYERS, HEADS, INNER = 32, 2, 2, 64
SIGHT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "mlp_ratio": 4, "patch_size": 16}
IMAGE_SIZE, TOKENS, CODES = 64, 16, 64
TOWER = "siglip_tiny_patch16_64"


class DeepSeekJanus(nn.Module):
    """The modules under DeepSeek's names, with the random weights of a seed."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.vision_model = nn.ModuleDict(
            {
                "vision_tower": VisionTransformer(
                    img_size=IMAGE_SIZE,
                    patch_size=SIGHT["patch_size"],
                    embed_dim=SIGHT["hidden_size"],
                    depth=SIGHT["num_hidden_layers"],
                    num_heads=SIGHT["num_attention_heads"],
                    class_token=False,
                    global_pool="map",
                    num_classes=0,
                )
            }
        )
        self.aligner = nn.ModuleDict({"layers": mlp(SIGHT["hidden_size"])})
        self.gen_vision_model = VQModel(VQConfig(32, 32, CODES, 8))
        self.gen_aligner = nn.ModuleDict({"layers": mlp(8)})
        self.gen_embed = nn.Embedding(CODES, 8)
        self.gen_head = nn.ModuleDict(
            {"output_mlp_projector": nn.Linear(WIDTH, WIDTH), "vision_head": nn.Linear(WIDTH, CODES)}
        )
        self.language_model = LlamaForCausalLM(LlamaConfig(**language_config()))
        for weight in self.parameters():  # large enough that every part affects the logits
            if weight.dim() > 1 and weight.shape[0] < VOCABULARY:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        nn.init.normal_(self.gen_embed.weight)
        nn.init.normal_(self.language_model.model.embed_tokens.weight)
        nn.init.normal_(self.language_model.lm_head.weight)
        self.eval().requires_grad_(False)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Input embeddings of image tokens."""
        return self.gen_aligner["layers"](self.gen_embed(codes))

    def next_code_logits(self, embeds: Tensor) -> Tensor:
        """Logits of the next image token after the last of [B, S, E] embeddings."""
        hidden = self.language_model.model(inputs_embeds=embeds).last_hidden_state[:, -1]
        return self.gen_head["vision_head"](nn.functional.gelu(self.gen_head["output_mlp_projector"](hidden)))

    def draw(self, ids: list[int], guidance: float = 5.0) -> list[int]:
        """The most likely image tokens for a prompt's ids, by the loop of DeepSeek's script: its second row has pad
        tokens in place of all ids but the first and the last."""
        rows = torch.tensor([ids, [ids[0], *[IDS[PAD]] * (len(ids) - 2), ids[-1]]])
        embeds, codes = self.language_model.model.embed_tokens(rows), []
        for _ in range(TOKENS):
            with_text, without = self.next_code_logits(embeds)
            codes.append(int((without + guidance * (with_text - without)).argmax()))
            embeds = torch.cat([embeds, self.embed_codes(torch.tensor([[codes[-1]]] * 2))], dim=1)
        return codes

    def see(self, pixels: Tensor) -> Tensor:
        """Input embeddings of images, [B, T, E]."""
        tower: Any = self.vision_model["vision_tower"]
        return self.aligner["layers"](tower.forward_features(pixels))


def mlp(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def language_config() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 16_384,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }


def part(cls: str, model_type: str, **params: Any) -> dict[str, Any]:
    return {"cls": cls, "model_type": model_type, "params": params}


def config() -> dict[str, Any]:
    mlp_gelu = {"depth": 2, "n_embed": WIDTH, "projector_type": "mlp_gelu"}
    return {
        "aligner_config": part("MlpProjector", "aligner", input_dim=SIGHT["hidden_size"], **mlp_gelu),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": part("MlpProjector", "gen_aligner", input_dim=8, **mlp_gelu),
        "gen_head_config": part(
            "vision_head", "gen_head", image_token_embed=WIDTH, image_token_size=CODES, n_embed=WIDTH
        ),
        "gen_vision_config": part("VQ-16", "gen_vision", image_token_size=CODES, n_embed=8),
        "language_config": language_config(),
        "model_type": "multi_modality",
        "torch_dtype": "float32",
        "transformers_version": "4.33.1",
        "vision_config": part(
            "CLIPVisionTower", "vision", image_size=IMAGE_SIZE, model_name=TOWER, select_feature="same", select_layer=-1
        ),
    }


def tokenizer(roles: bool = True) -> Tokenizer:
    """A byte-level BPE with the embedded model's words, cut as DeepSeek's cuts, and Janus-Pro's ids of control tokens.

    Adds no BOS: DeepSeek's script does, by the class with which it loads the file.
    """
    words = json.loads((model_folder(EMBEDDED) / "tokenizer.json").read_text())["model"]
    control = IDS | (ROLE_IDS if roles else {})
    names = [word for word in words["vocab"] if not word.startswith("<") or word == "<"]
    names += [f"\u0120word{i}" for i in range(len(names), max(control.values()) + 1)]
    for token, number in control.items():
        names[number] = token
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [tuple(pair) for pair in words["merges"]]))
    cuts = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5]+"]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return made


def register(patch: Any) -> None:
    """Make the sizes of the small model known, for as long as a MonkeyPatch lasts."""
    small = {"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2}
    patch.setitem(multi_modality.VISION_TOWERS, TOWER, SIGHT)
    patch.setitem(multi_modality.IMAGE_TOKENIZERS, "VQ-16", small)


def write(folder: Path, kind: Literal["bin", "safetensors"], shards: int = 1, sft_format: str = "deepseek") -> Path:
    """Write the checkpoint with the weights of seed 0, in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in DeepSeekJanus().state_dict().items()}
    whole = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[kind]
    save = torch.save if kind == "bin" else save_file
    if shards == 1:
        save(weights, folder / whole)
    else:
        stem, _, suffix = whole.partition(".")
        places = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}.{suffix}" for i, name in enumerate(weights)}
        for file in set(places.values()):
            save({name: weights[name] for name, place in places.items() if place == file}, folder / file)
        (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tokenizer(roles=sft_format == "deepseek").save(str(folder / "tokenizer.json"))
    for name, content in {
        "config.json": config(),
        "preprocessor_config.json": {
            "background_color": [127, 127, 127],
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "VLMImageProcessor",
            "image_size": IMAGE_SIZE,
            "image_std": [0.5, 0.5, 0.5],
            "min_size": 14,
            "processor_class": "VLChatProcessor",
            "rescale_factor": 0.00392156862745098,
        },
        "processor_config.json": {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": IMAGE,
            "mask_prompt": True,
            "num_image_tokens": 576,
            "processor_class": "VLChatProcessor",
            "sft_format": sft_format,
        },
        "special_tokens_map.json": {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        "tokenizer_config.json": {
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": 16_384,
            "pad_token": None,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": None,
            "use_default_system_prompt": True,
        },
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder
