"""Measures the embedded model against its bars, and writes the figures.

    python -m tools.emoji_world.measure --out docs/results/emoji_world_model.json

Drawing: images sampled from prompts with every (style, object) pair, named by the judge. Captions: the
object named in the model's captions of held-out renderings. Tokenizer: PSNR of held-out renderings. The judge:
held-out renderings named right.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch

from tools.emoji_world.scenes import held_out
from tools.emoji_world.world import BACKGROUNDS, OBJECTS, STYLES, caption
from vce_ray.config import SamplingConfig, default_sampling
from vce_ray.evaluation.judge import Judge
from vce_ray.models.janus import Janus
from vce_ray.sampling import draw

BARS = {"style": 0.95, "object": 0.90, "captions": 0.95, "psnr": 24.0, "judge_style": 0.98, "judge_object": 0.98}


def measure_drawing(model: Janus, judge: Judge, count: int, sampling: SamplingConfig) -> dict[str, float]:
    """Shares of `count` sampled images whose style and object the judge names as the prompt does."""
    rng = random.Random(77)
    pairs = [(name, style) for name in OBJECTS for style in STYLES]
    asked = [pairs[i % len(pairs)] for i in range(count)]
    prompts = [caption(name, style, rng.choice(tuple(BACKGROUNDS))) for name, style in asked]
    images = model.decode_pixels(draw(model, prompts, list(range(10**6, 10**6 + count)), sampling))
    seen_BE = judge.look(images)
    objects = judge.name_labels(seen_BE, OBJECTS, "object")
    styles = judge.name_labels(seen_BE, STYLES, "style")
    return {
        "object": float(np.mean([o == name for o, (name, _) in zip(objects, asked)])),
        "style": float(np.mean([s == style for s, (_, style) in zip(styles, asked)])),
    }


def measure_renderings(model: Janus, judge: Judge, count: int) -> dict[str, float]:
    """Captions, tokenizer and judge on `count` held-out renderings."""
    scenes, images = zip(*held_out(count), strict=True)
    images = np.stack(images)
    captions = [line for i in range(0, count, 48) for line in model.caption(images[i : i + 48])]
    named = [f" {OBJECTS[s.thing]} " in f" {c} " for s, c in zip(scenes, captions) if s.thing is not None]
    again = np.concatenate([model.decode_pixels(model.encode_pixels(images[i : i + 64])) for i in range(0, count, 64)])
    mse = ((again.astype(float) - images) ** 2).mean((1, 2, 3)) / 255**2
    seen_BE = judge.look(images)
    objects = judge.name_labels(seen_BE, OBJECTS, "object")
    styles = judge.name_labels(seen_BE, STYLES, "style")
    return {
        "captions": float(np.mean(named)),
        "psnr": float((-10 * np.log10(mse)).mean()),
        "judge_object": float(np.mean([o == OBJECTS[s.thing] for o, s in zip(objects, scenes) if s.thing is not None])),
        "judge_style": float(np.mean([o == STYLES[s.style] for o, s in zip(styles, scenes)])),
    }


def main() -> int:
    """Prints each figure beside its bar; exit code 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = Path(__file__).parents[2] / "vce_ray/models/emoji_world"
    parser.add_argument("--model", type=Path, default=package / "janus")
    parser.add_argument("--judge", type=Path, default=package / "judge")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--renderings", type=int, default=960)
    usual = default_sampling("emoji-world")
    parser.add_argument("--guidance", type=float, default=usual.guidance_scale)
    parser.add_argument("--temperature", type=float, default=usual.temperature)
    parser.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, judge = Janus.from_folder(args.model), Judge(args.judge)
    figures = measure_renderings(model, judge, args.renderings)
    sampling = SamplingConfig(guidance_scale=args.guidance, temperature=args.temperature, kv_cache_dtype=args.kv_cache)
    figures |= measure_drawing(model, judge, args.images, sampling)
    for name, bar in BARS.items():
        print(f"{name:<13} {figures[name]:8.4f}   bar {bar}   {'met' if figures[name] >= bar else 'MISSED'}")
    if args.out:
        facts = {"images": args.images, "renderings": args.renderings}
        facts |= {"guidance": args.guidance, "temperature": args.temperature}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"figures": figures, "bars": BARS, **facts}, indent=2) + "\n")
    return int(any(figures[name] < bar for name, bar in BARS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
