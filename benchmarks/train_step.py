"""Time and memory of a VSafe-DPO training step on released models' shapes, and the share of the arithmetic limit.

    python -m benchmarks.train_step --models janus-pro-1b janus-pro-7b --out docs/results/train_gpu.json

One worker, LoRA, random weights and tokens. The loss is that of training (training/objectives/vsafe_dpo.py), with all
its terms. Each step has new kept images, so their targets are computed every time, which is the worst case. Each model
is measured with and without recomputation of its layers in the backward pass, each time in its own process. If it does
not fit into memory, the row says so.
The limit counts the matrix products of the decoder layers and the head: a forward pass, a backward pass (frozen weights
need no gradients of their own), a second forward pass if layers are recomputed, and the passes for the targets; all at
the speed of a square matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import JANUS, build, peak_memory, write_rows
from vce_ray.config import EMBEDDED
from vce_ray.devices import Device
from vce_ray.sampling.measure import measure_device
from vce_ray.training.objectives.vsafe_dpo import VSafeDPO, VSafeDPOBatch, VSafeDPOConfig
from vce_ray.training.terms.batches import AnchorBatch, KeepBatch, PairBatch
from vce_ray.training.terms.divergence import Targets
from vce_ray.training.trainable import in_own_dtype, make_trainable, recompute_layers, reference_context

PROMPT, REFINED = "a deer in the style of openmoji on a blue background", "a deer on a blue background"


def measure(name: str, args: argparse.Namespace, recomputed: bool, limits: Device) -> dict[str, Any]:
    """Measure one row: time of the fastest step, peak memory, and the share of the limit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(name, str(device), getattr(torch, args.dtype))
    objective = VSafeDPO(VSafeDPOConfig(batch_size=args.pairs, keep_batch_size=args.keep, prompt_mode="given"))
    make_trainable(model.net, objective.settings)
    if recomputed:
        recompute_layers(model.net)
    targets = Targets(model, reference_context(model, model))
    trained = [p for p in model.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    peak_memory(reset=True)
    times = []
    for step in range(args.steps):
        batch = step_batch(step, args, model.num_image_tokens, model.image_vocab_size, device)
        start = time.perf_counter()
        try:
            with in_own_dtype(model.net):
                loss, _ = objective.loss(model, targets, batch, step)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        except torch.OutOfMemoryError:
            return {"model": name, "recomputed": recomputed, "pairs": args.pairs, "keep": args.keep, "fits": False}
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    length = model.encode_prompts([PROMPT]).mask_BP.shape[1] + model.num_image_tokens - 1
    images = 2 * args.pairs + args.keep  # as many as rows of targets: two per anchor, one per kept image
    products = 2 * model.shape.step_parameters * length * images * (4 if recomputed else 3)
    row = {"model": name, "recomputed": recomputed, "pairs": args.pairs, "keep": args.keep, "fits": True}
    row |= {"step_s": min(times), "images_per_s": images / min(times)}
    return row | {"share_of_limit": products / limits.arithmetic / min(times), "peak_gb": peak_memory() / 1e9}


def step_batch(
    step: int, args: argparse.Namespace, length: int, vocabulary: int, device: torch.device
) -> VSafeDPOBatch:
    """Make the batch of a step: pairs, kept images and anchors of random tokens."""
    generator = torch.Generator().manual_seed(step)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(vocabulary, (count, length), generator=generator).to(device)

    chosen, rejected, kept = tokens(args.pairs), tokens(args.pairs), tokens(args.keep)
    reference = torch.full((args.pairs, length), -9.0, device=device)
    seeds, prompts = torch.arange(args.pairs, device=device), [PROMPT] * args.pairs
    pairs = PairBatch(prompts, [False] * args.pairs, seeds, chosen, rejected, reference, reference)
    keep_rows = [step * args.keep + i for i in range(args.keep)]
    keep = KeepBatch(keep_rows, [REFINED] * args.keep, [False] * args.keep, kept)
    rows = [step * args.pairs + i for i in range(args.pairs)]
    return VSafeDPOBatch(pairs, keep, AnchorBatch(rows, prompts, [REFINED] * args.pairs, chosen))


def main() -> int:
    """Measure, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[EMBEDDED], choices=[EMBEDDED, *JANUS])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    limits = measure_device(device, dtype)
    rows = []
    for name in args.models:
        for recomputed in (True, False):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                row = process.submit(measure, name, args, recomputed, limits).result()
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.out:
        write_rows(args.out, limits, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
