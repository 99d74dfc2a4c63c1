"""Train the judge of the emoji world: a small CLIP in open_clip's format, independent of the model it evaluates.

    python -m tools.emoji_world.train_judge --out build/emoji_world        # resumes from its checkpoint

It is trained on renderings of its own seeds, with blur, noise and colour shifts, never on generated images. Three
quarters of them are encoded and decoded by the image tokenizer, as every image that it will judge is, with some tokens
replaced by similar ones, so that it does not mistake blur or a wrong patch for a style.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from tools.emoji_world import scenes
from tools.emoji_world.progress import Training, load_checkpoint, pick_device
from tools.emoji_world.tokenizer import build_tokenizer
from tools.emoji_world.train_vq import CONFIG as VQ
from tools.emoji_world.train_vq import decode, latents
from tools.emoji_world.world import (
    BACKGROUNDS,
    OBJECTS,
    STYLES,
    WORDS,
    Scene,
    fill,
    random_prompt,
    random_scene,
    write_words,
)
from vce_ray.evaluation.detectors.base import NOTHING

CONTEXT = 32
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": scenes.EDGE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 0,  # set from the tokenizer
        "hf_tokenizer_name": "local",
        "width": 128,
        "heads": 4,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": 2,
    },
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
LABELS = (
    [fill("{a} {o}", name) for name in OBJECTS] + [NOTHING],
    [f"in the style of {name}" for name in STYLES],
    [f"a {name} background" for name in BACKGROUNDS],
)


def build_judge_tokenizer():
    """Return the world's tokenizer with an end-of-text token and right padding, as open_clip expects."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    template = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def encode_texts(tokenizer, texts: list[str]) -> Tensor:
    """Return token ids, int64 [texts, CONTEXT]."""
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
    return tokenizer(texts, **options)["input_ids"]


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Apply random blur, noise, colour shift, zoom and translation per image: float [B, 3, H, W] in -1..1."""
    options: dict[str, Any] = {"generator": generator, "device": pixels.device}
    rand = lambda *shape: torch.rand(*shape, **options)
    count = len(pixels)
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    strength = (rand(count, 1, 1, 1) * 1.4 - 0.4).clamp(min=0)
    pixels = pixels + strength * (blurred - pixels)
    pixels = pixels * (0.85 + 0.3 * rand(count, 3, 1, 1)) + 0.2 * (rand(count, 3, 1, 1) - 0.5)
    noise = torch.randn(pixels.shape, **options)
    coarse = torch.randn(count, 3, 16, 16, **options)
    coarse = F.interpolate(coarse, size=pixels.shape[-2:], mode="bilinear")
    pixels = pixels + 0.12 * rand(count, 1, 1, 1) * noise + 0.3 * rand(count, 1, 1, 1) * coarse
    zoom, shift = 0.9 + 0.2 * rand(count, 1), 0.1 * (rand(count, 2) - 0.5)
    theta = torch.zeros(count, 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom[:, 0], zoom[:, 0], shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False).clamp(-1, 1)


@torch.no_grad()
def through_tokenizer(vq: JanusVQVAE, pixels: Tensor, generator: torch.Generator, near: int = 4) -> Tensor:
    """Encode and decode images with the image tokenizer, float [B, 3, H, W] in -1..1.

    Up to 40 % of an image's tokens are replaced by one of their `near` nearest codes, since generated tokens are not
    always the nearest ones either.
    """
    z = latents(vq, pixels)
    codes = F.normalize(vq.quantize.embedding.weight, dim=1)
    nearest = (z @ codes.T).topk(near, dim=-1).indices
    options: dict[str, Any] = {"generator": generator, "device": z.device}
    replaced = torch.rand(z.shape[:-1], **options) < 0.4 * torch.rand(len(z), 1, 1, **options)
    pick = torch.randint(near, z.shape[:-1], **options) * replaced
    return decode(vq, codes[nearest.gather(-1, pick[..., None])[..., 0]]).clamp(-1, 1)


def labels(scene: Scene) -> tuple[int, int, int]:
    """Return indices into LABELS. The style of an empty scene is -100, which cross-entropy ignores."""
    thing = len(OBJECTS) if scene.thing is None else scene.thing
    return thing, -100 if scene.thing is None else scene.style, list(BACKGROUNDS).index(scene.background)


def export(model: CLIP, tokenizer, folder: Path) -> None:
    """Write an open_clip folder with weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    write_words(folder, [*WORDS, NOTHING])
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    MODEL["text_cfg"]["vocab_size"] = len(tokenizer)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train, with checkpoints from which the same command resumes, and export the judge at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start-from", type=Path, help="folder of a judge with the weights to start from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    device = pick_device()
    vq = JanusVQVAE(JanusVQVAEConfig(**VQ)).eval().requires_grad_(False)
    trained = load_checkpoint(args.out / "decoder.pt") or load_checkpoint(args.out / "vq.pt")
    if trained is None:
        raise SystemExit(f"{args.out}/vq.pt is missing: run tools.emoji_world.train_vq first")
    vq.load_state_dict(trained["model"])
    torch.nn.Module.to(vq, device)
    tokenizer = build_judge_tokenizer()
    text_cfg = CLIPTextCfg(**(MODEL["text_cfg"] | {"vocab_size": len(tokenizer)}))
    model = CLIP(MODEL["embed_dim"], CLIPVisionCfg(**MODEL["vision_cfg"]), text_cfg, output_dict=False)
    if args.start_from:
        weights = load_file(args.start_from / "open_clip_model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    model.to(device)
    blocks = [*model.visual.transformer.parameters(), *model.transformer.parameters()]
    hidden = [p for p in blocks if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2 or all(p is not h for h in hidden)]
    optims = [
        torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    training = Training(args.out / "judge.pt", model, optims, steps=args.steps, lr=args.lr)
    label_ids = encode_texts(tokenizer, [text for group in LABELS for text in group]).to(device)
    sizes = [len(group) for group in LABELS]
    model.train()
    for step in range(training.first_step, args.steps):
        rng = random.Random(15_485_863 * step + 5)
        rendered = [random_scene(rng) for _ in range(args.batch)]
        images = np.stack([scenes.render(scene, rng) for scene in rendered])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        generator, clean = torch.Generator(device).manual_seed(step), args.batch // 4
        pixels = torch.cat([pixels[:clean], through_tokenizer(vq, pixels[clean:], generator)])
        pixels = augment(pixels, generator)
        prompts = [random_prompt(rng, scene) for scene in rendered]
        image = F.normalize(model.encode_image(pixels), dim=-1)
        prompt_ids = encode_texts(tokenizer, prompts).to(device)
        text = F.normalize(model.encode_text(torch.cat([label_ids, prompt_ids])), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * image @ text.T
        *label_logits, batch_logits = logits.split([*sizes, args.batch], dim=1)
        targets = torch.tensor([labels(scene) for scene in rendered], device=device)
        losses = [F.cross_entropy(label_logits[i], targets[:, i]) for i in range(3)]
        # several images of a batch can share a prompt: these are excluded from each other's negatives
        number = {prompt: i for i, prompt in enumerate(prompts)}
        which, own = (
            torch.tensor([number[prompt] for prompt in prompts], device=device),
            torch.arange(args.batch, device=device),
        )
        same = (which[:, None] == which) & (own[:, None] != own)
        batch_logits = batch_logits.masked_fill(same, float("-inf"))
        contrast = (F.cross_entropy(batch_logits, own) + F.cross_entropy(batch_logits.T, own)) / 2
        (sum(losses, 0.3 * contrast)).backward()
        object_accuracy = (label_logits[0].argmax(1) == targets[:, 0]).float().mean()
        style_accuracy = (label_logits[1].argmax(1) == targets[:, 1])[targets[:, 1] >= 0].float().mean()
        values = {"contrast": contrast.item(), "objects": object_accuracy.item(), "styles": style_accuracy.item()}
        training.finish_step(step, values)
    export(model.cpu().eval(), tokenizer, args.out / "judge")
    print(f"exported to {args.out / 'judge'}")


if __name__ == "__main__":
    main()
