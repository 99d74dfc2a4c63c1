"""CLIPs in open_clip's formats, with random weights: a softmax model and a SigLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file

from tools.emoji_world.train_judge import PREPROCESS, build_judge_tokenizer

SIGLIP_SCALE = 117.0
"""Temperature of the released SigLIP models, about: above the 100 to which those of softmax models are clamped."""


def vit() -> dict[str, Any]:
    """Settings of a ViT CLIP, as open_clip writes them for ViT-B-32, with fewer and narrower layers."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 0, "hf_tokenizer_name": "local", "width": 32, "heads": 2, "layers": 1}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | {"pool_type": "eos", "eos_id": 2}}


def siglip() -> dict[str, Any]:
    """The same as a SigLIP: its text tower is a module of its own, and a bias is added to the logits."""
    model = vit() | {"init_logit_bias": -10, "custom_text": True}
    model["text_cfg"] |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    return model


def save(folder: Path, model_cfg: dict[str, Any]) -> CLIP | CustomTextCLIP:
    """Make a model of these settings and write its folder as open_clip does."""
    torch.manual_seed(0)
    tokenizer = build_judge_tokenizer()
    model_cfg["text_cfg"]["vocab_size"] = len(tokenizer)
    settings = {key: value for key, value in model_cfg.items() if key not in ("custom_text", "vision_cfg", "text_cfg")}
    kind = CustomTextCLIP if model_cfg.get("custom_text") else CLIP
    vision, text = CLIPVisionCfg(**model_cfg["vision_cfg"]), CLIPTextCfg(**model_cfg["text_cfg"])
    model = kind(vision_cfg=vision, text_cfg=text, **settings).eval()
    if model_cfg.get("custom_text"):
        model.logit_scale.data.fill_(np.log(SIGLIP_SCALE))
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model
