"""Trains the model of the emoji world that draws and captions; the image tokenizer must be trained before.

python -m tools.emoji_world.train_janus --out build/emoji_world       # resumes where it stopped
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
"""Share of pictures that are learned without their prompt, for classifier-free guidance."""
EMPHASIS = {"openmoji": 1.5, "lineart": 1.5}
"""How often a style is seen in training, against 1: these two share their outlines, so they are learned last."""


def picture(index: int) -> tuple[Scene, np.ndarray]:
    """The index-th picture of the training set, always the same."""
    rng = random.Random(7_368_787 * index + 3)
    scene = random_scene(rng)
    return scene, scenes.render(scene, rng)


class Pictures(Dataset[np.ndarray]):
    """The training set, rendered."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return picture(index)[1]


def tokenise(model: Janus, count: int, path: Path, workers: int) -> Tensor:
    """Image tokens of the first `count` pictures, int16 [count, T]; kept in a file between runs."""
    if path.exists():
        tokens = torch.load(path, weights_only=True)
        if len(tokens) != count:
            raise SystemExit(f"{path} holds {len(tokens)} pictures, not {count}: use another --out, or delete it")
        return tokens
    parts = []
    for batch in DataLoader(Pictures(count), batch_size=128, num_workers=workers):
        parts.append(model.encode_pixels(batch.numpy()).short().cpu())
        if len(parts) % 100 == 0:
            print(f"tokenised {128 * len(parts)}/{count}", flush=True)
    tokens = torch.cat(parts)
    torch.save(tokens, path)
    return tokens


def optimizers(net: JanusForConditionalGeneration, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of both transformers, AdamW for embeddings, heads and norms. The tokenizer rests."""
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
class Lesson:
    """What one step learns: prompts of pictures that it draws, pictures that it reads."""

    indices: list[int]
    prompts: list[str]
    blank: list[bool]
    """Which pictures are drawn without their prompt."""
    pixels: Tensor
    """Of the pictures to read: float [captions, 3, H, W] in -1..1."""
    captions: list[str]


class Lessons(Dataset[Lesson]):
    """The lesson of every step, always the same for the same step; a loader's workers make them ahead."""

    def __init__(self, steps: int, pictures: int, batch: int, captions: int):
        self.steps, self.batch, self.count = steps, batch, batch + captions
        weights = (EMPHASIS.get(STYLES[picture_scene(i).style], 1.0) for i in range(pictures))
        self.cumulative = list(accumulate(weights))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Lesson:
        rng = random.Random(9_999_991 * step + 11)
        chosen = rng.choices(range(len(self.cumulative)), cum_weights=self.cumulative, k=self.count)
        indices, read = chosen[: self.batch], [picture(i) for i in chosen[self.batch :]]
        prompts = [random_prompt(rng, picture_scene(i)) for i in indices]
        blank = [rng.random() < UNCONDITIONAL for _ in indices]
        pixels = torch.from_numpy(np.stack([image for _, image in read])).permute(0, 3, 1, 2).float() / 127.5 - 1
        nouns = [None if scene.thing is None else THINGS[scene.thing].name for scene, _ in read]
        lines = [caption(noun, STYLES[scene.style], scene.background) for noun, (scene, _) in zip(nouns, read)]
        return Lesson(indices, prompts, blank, pixels, lines)


def picture_scene(index: int) -> Scene:
    """The scene of the index-th picture, without rendering it."""
    return random_scene(random.Random(7_368_787 * index + 3))


def drawing_loss(model: Janus, lesson: Lesson, tokens: Tensor) -> Tensor:
    """Cross-entropy of image tokens given prompts, some of them blanked out."""
    prompts = model.encode_prompts(lesson.prompts).blanked(lesson.blank)
    targets = tokens[lesson.indices].to(model.device, torch.long)
    logits = model.image_logits(prompts, targets)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def caption_loss(model: Janus, lesson: Lesson) -> Tensor:
    """Cross-entropy of the one caption sentence given the picture."""
    tokenizer, net = model.tokenizer, model.net
    boi, eoi = (tokenizer.convert_tokens_to_ids(t) for t in (tokenizer.boi_token, tokenizer.eoi_token))
    head = [tokenizer.bos_token_id, boi] + [net.config.image_token_id] * model.num_image_tokens + [eoi]
    rows = [[*row[1:], tokenizer.eos_token_id] for row in tokenizer(lesson.captions)["input_ids"]]
    width = max(map(len, rows))
    ids = torch.tensor([head + row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]).to(model.device)
    seen = net(input_ids=ids, pixel_values=lesson.pixels.to(model.device), use_cache=False, logits_to_keep=width + 1)
    logits = seen.logits[:, :-1]
    targets = ids[:, -width:].masked_fill(ids[:, -width:] == tokenizer.pad_token_id, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def main() -> None:
    """Trains, and writes checkpoints that the same command resumes from; at the end exports the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--captions", type=int, default=8, help="of each batch, in addition")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare steps ahead, for a GPU")
    parser.add_argument(
        "--start-from", type=Path, help="a checkpoint folder whose weights, tokenizer too, to go on from"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device()
    processor = build_processor()
    net = build_model(processor)
    if args.start_from:
        started = JanusForConditionalGeneration.from_pretrained(args.start_from, dtype=torch.float32)
        net.load_state_dict(started.state_dict())
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
    tokens = tokenise(model, args.pictures, args.out / "tokens.pt", args.workers)
    optims = optimizers(net, args.lr)
    training = Training(args.out / "janus.pt", net, optims, steps=args.steps, lr=args.lr, every=200)
    lessons = Lessons(args.steps, args.pictures, args.batch, args.captions)
    ahead = DataLoader(lessons, batch_size=None, sampler=range(training.begin, args.steps), num_workers=args.workers)
    net.train()
    for step, lesson in enumerate(ahead, training.begin):
        drawing, reading = drawing_loss(model, lesson, tokens), caption_loss(model, lesson)
        (drawing + 0.3 * reading).backward()
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 1.0)
        training.finish_step(step, {"drawing": drawing.item(), "reading": reading.item()})
    export(net.cpu().eval(), processor, args.out / "janus")
    print(f"exported to {args.out / 'janus'}")


if __name__ == "__main__":
    main()
