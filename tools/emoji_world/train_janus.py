"""Train the emoji world's Janus, which generates and captions images. Train the image tokenizer first.

python -m tools.emoji_world.train_janus --out build/emoji_world       # resumes from its checkpoint
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import JanusForConditionalGeneration

from tools.emoji_world import scenes
from tools.emoji_world.checkpoint import build_model, build_processor, export
from tools.emoji_world.progress import Training, load_checkpoint, pick_device
from tools.emoji_world.world import STYLES, THINGS, Scene, caption, random_prompt, random_scene
from vce_ray.models.janus import Janus

UNCONDITIONAL = 0.1
"""Share of images trained without their prompt, for classifier-free guidance."""
EMPHASIS = {"openmoji": 1.5, "lineart": 1.5}
"""Sampling weight of a style, default 1. These two share their outlines, so the model learns them last."""


def training_image(index: int) -> tuple[Scene, np.ndarray]:
    """Return the index-th image of the training set and its scene, always the same."""
    rng = random.Random(7_368_787 * index + 3)
    scene = random_scene(rng)
    return scene, scenes.render(scene, rng)


class TrainingImages(Dataset[np.ndarray]):
    """The rendered training set."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return training_image(index)[1]


def tokenize(model: Janus, count: int, path: Path, workers: int) -> Tensor:
    """Return image tokens of the first `count` training images, int16 [count, T], cached in a file between runs."""
    if path.exists():
        tokens = torch.load(path, weights_only=True)
        if len(tokens) != count:
            raise SystemExit(f"{path} has tokens of {len(tokens)} images, not {count}: use another --out, or delete it")
        return tokens
    parts = []
    for batch in DataLoader(TrainingImages(count), batch_size=128, num_workers=workers):
        parts.append(model.encode_pixels(batch.numpy()).short().cpu())
        if len(parts) % 100 == 0:
            print(f"tokenized {128 * len(parts)}/{count}", flush=True)
    tokens = torch.cat(parts)
    torch.save(tokens, path)
    return tokens


def optimizers(net: JanusForConditionalGeneration, lr: float) -> list[torch.optim.Optimizer]:
    """Freeze the tokenizer; return Muon for both transformers' matrices, AdamW for embeddings, heads and norms."""
    net.model.vqmodel.requires_grad_(False)
    towers = [net.model.language_model.layers, net.model.vision_model.encoder.layers]
    hidden = [p for tower in towers for p in tower.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Batch:
    """Data of one step: prompts and image indices for generation, images and sentences for captioning."""

    indices: list[int]
    prompts: list[str]
    blank: list[bool]
    """Which images are trained without their prompt."""
    pixels: Tensor
    """Images to caption: float [captions, 3, H, W] in -1..1."""
    captions: list[str]


class Batches(Dataset[Batch]):
    """The batch of every step, always the same for the same step, so that a resumed training sees the same data."""

    def __init__(self, steps: int, images: int, batch: int, captions: int):
        self.steps, self.batch, self.count = steps, batch, batch + captions
        weights = (EMPHASIS.get(STYLES[training_scene(i).style], 1.0) for i in range(images))
        self.cumulative = list(accumulate(weights))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(9_999_991 * step + 11)
        chosen = rng.choices(range(len(self.cumulative)), cum_weights=self.cumulative, k=self.count)
        indices, captioned = chosen[: self.batch], [training_image(i) for i in chosen[self.batch :]]
        prompts = [random_prompt(rng, training_scene(i)) for i in indices]
        blank = [rng.random() < UNCONDITIONAL for _ in indices]
        pixels = torch.from_numpy(np.stack([image for _, image in captioned])).permute(0, 3, 1, 2).float() / 127.5 - 1
        nouns = [None if scene.thing is None else THINGS[scene.thing].name for scene, _ in captioned]
        lines = [caption(noun, STYLES[scene.style], scene.background) for noun, (scene, _) in zip(nouns, captioned)]
        return Batch(indices, prompts, blank, pixels, lines)


def training_scene(index: int) -> Scene:
    """Return the scene of the index-th training image without rendering it."""
    return random_scene(random.Random(7_368_787 * index + 3))


def generation_loss(model: Janus, batch: Batch, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of image tokens given prompts, some of them blanked out."""
    prompts = model.encode_prompts(batch.prompts).blanked(batch.blank)
    targets = tokens[batch.indices].to(model.device, torch.long)
    logits = model.image_logits(prompts, targets)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def caption_loss(model: Janus, batch: Batch) -> Tensor:
    """Return the cross-entropy of the caption given the image."""
    tokenizer, net = model.tokenizer, model.net
    boi, eoi = (tokenizer.convert_tokens_to_ids(t) for t in (tokenizer.boi_token, tokenizer.eoi_token))
    head = [tokenizer.bos_token_id, boi] + [net.config.image_token_id] * model.num_image_tokens + [eoi]
    rows = [[*row[1:], tokenizer.eos_token_id] for row in tokenizer(batch.captions)["input_ids"]]
    width = max(map(len, rows))
    ids = torch.tensor([head + row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]).to(model.device)
    outputs = net(input_ids=ids, pixel_values=batch.pixels.to(model.device), use_cache=False, logits_to_keep=width + 1)
    logits = outputs.logits[:, :-1]
    targets = ids[:, -width:].masked_fill(ids[:, -width:] == tokenizer.pad_token_id, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def main() -> None:
    """Train, with checkpoints from which the same command resumes, and export the model at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pictures", type=int, default=48_000, help="number of training images")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--captions", type=int, default=8, help="images to caption per batch, in addition to --batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches ahead, for a GPU")
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint folder with the weights to start from, image tokenizer included"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device()
    processor = build_processor()
    net = build_model(processor)
    if args.start_from:
        pretrained = JanusForConditionalGeneration.from_pretrained(args.start_from, dtype=torch.float32)
        net.load_state_dict(pretrained.state_dict())
    elif (vq := load_checkpoint(args.out / "vq.pt")) is not None:
        net.model.vqmodel.load_state_dict(vq["model"])
    else:
        raise SystemExit(f"{args.out}/vq.pt is missing: run tools.emoji_world.train_vq first")
    with torch.no_grad():
        codes = F.normalize(net.model.vqmodel.quantize.embedding.weight, dim=1)
        net.model.vqmodel.quantize.embedding.weight.copy_(codes)
        if not args.start_from:
            net.model.generation_embeddings.weight.copy_(codes)
    nn.Module.to(net, device)
    model = Janus(net, processor, revision="training")
    tokens = tokenize(model, args.pictures, args.out / "tokens.pt", args.workers)
    optims = optimizers(net, args.lr)
    training = Training(args.out / "janus.pt", net, optims, steps=args.steps, lr=args.lr, every=200)
    batches = Batches(args.steps, args.pictures, args.batch, args.captions)
    steps = range(training.first_step, args.steps)
    loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=args.workers)
    net.train()
    for step, batch in zip(steps, loader):
        generation, captioning = generation_loss(model, batch, tokens), caption_loss(model, batch)
        (generation + 0.3 * captioning).backward()
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 1.0)
        training.finish_step(step, {"generation": generation.item(), "captioning": captioning.item()})
    export(net.cpu().eval(), processor, args.out / "janus")
    print(f"exported to {args.out / 'janus'}")


if __name__ == "__main__":
    main()
