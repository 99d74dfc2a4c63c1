"""Measure the embedded model, compare it with its acceptance thresholds, and write the metrics.

    python -m tools.emoji_world.measure --out docs/results/emoji_world_model.json

Generation: share of sampled images, over prompts with every (style, object) pair, that the judge classifies correctly.
Captions: share of held-out renderings whose caption names the right object. Tokenizer: PSNR on held-out renderings.
Judge: its accuracy on held-out renderings.
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
from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.evaluation.clip_model import ClipModel
from vce_ray.models.families import default_sampling
from vce_ray.models.janus import Janus
from vce_ray.sampling import draw

BARS = {"style": 0.95, "object": 0.90, "captions": 0.95, "psnr": 24.0, "judge_style": 0.98, "judge_object": 0.98}


def measure_generation(model: Janus, judge: ClipModel, count: int, sampling: SamplingConfig) -> dict[str, float]:
    """Return the shares of `count` sampled images whose object and style, according to the judge, match the prompt."""
    rng = random.Random(77)
    pairs = [(name, style) for name in OBJECTS for style in STYLES]
    requested = [pairs[i % len(pairs)] for i in range(count)]
    prompts = [caption(name, style, rng.choice(tuple(BACKGROUNDS))) for name, style in requested]
    images = model.decode_pixels(draw(model, prompts, list(range(10**6, 10**6 + count)), sampling))
    embeddings_BE = judge.encode_images(images)
    objects = judge.best_labels(embeddings_BE, OBJECTS, "object")
    styles = judge.best_labels(embeddings_BE, STYLES, "style")
    return {
        "object": float(np.mean([o == name for o, (name, _) in zip(objects, requested)])),
        "style": float(np.mean([s == style for s, (_, style) in zip(styles, requested)])),
    }


def measure_renderings(model: Janus, judge: ClipModel, count: int) -> dict[str, float]:
    """Return the metrics of captions, tokenizer and judge on `count` held-out renderings."""
    scenes, images = zip(*held_out(count), strict=True)
    images = np.stack(images)
    captions = [line for i in range(0, count, 48) for line, _ in model.caption(images[i : i + 48])]
    named = [f" {OBJECTS[s.thing]} " in f" {c} " for s, c in zip(scenes, captions) if s.thing is not None]
    decoded = np.concatenate(
        [model.decode_pixels(model.encode_pixels(images[i : i + 64])) for i in range(0, count, 64)]
    )
    mse = ((decoded.astype(float) - images) ** 2).mean((1, 2, 3)) / 255**2
    embeddings_BE = judge.encode_images(images)
    objects = judge.best_labels(embeddings_BE, OBJECTS, "object")
    styles = judge.best_labels(embeddings_BE, STYLES, "style")
    return {
        "captions": float(np.mean(named)),
        "psnr": float((-10 * np.log10(mse)).mean()),
        "judge_object": float(np.mean([o == OBJECTS[s.thing] for o, s in zip(objects, scenes) if s.thing is not None])),
        "judge_style": float(np.mean([o == STYLES[s.style] for o, s in zip(styles, scenes)])),
    }


def main() -> int:
    """Print each metric with its threshold; return 1 if one is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = Path(__file__).parents[2] / "vce_ray/models/emoji_world"
    parser.add_argument("--model", type=Path, default=package / "janus")
    parser.add_argument("--judge", type=Path, default=package / "judge")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--renderings", type=int, default=960)
    defaults = default_sampling(EMBEDDED)
    parser.add_argument("--guidance", type=float, default=defaults.guidance_scale)
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, judge = Janus.from_folder(args.model), ClipModel(args.judge)
    metrics = measure_renderings(model, judge, args.renderings)
    sampling = SamplingConfig(guidance_scale=args.guidance, temperature=args.temperature, kv_cache_dtype=args.kv_cache)
    metrics |= measure_generation(model, judge, args.images, sampling)
    for name, bar in BARS.items():
        print(f"{name:<13} {metrics[name]:8.4f}   threshold {bar}   {'met' if metrics[name] >= bar else 'MISSED'}")
    if args.out:
        settings = {"images": args.images, "renderings": args.renderings}
        settings |= {"guidance": args.guidance, "temperature": args.temperature}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"figures": metrics, "bars": BARS, **settings}, indent=2) + "\n")
    return int(any(metrics[name] < bar for name, bar in BARS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
