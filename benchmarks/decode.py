"""Speed of sampling image tokens: this project's decoder against transformers' loop and against the machine's limit.

    python -m benchmarks.decode --models emoji-world janus-1b-cut --out docs/results/decode_cpu.json
    python -m benchmarks.decode --models janus-pro-1b janus-pro-7b llamagen-xl --batches 1 16 64 128 --dtype bfloat16
    python -m benchmarks.decode --models janus-1b-cut --batches 16 --profile

Each model is measured in its own process. After one warm-up call each, the two loops take turns, and the fastest round
of each counts. If transformers' loop does not fit into memory, the row has no ratio.
The embedded model has its real weights, all others random ones. Shapes are those of the released models;
`janus-1b-cut` has 4 of the 24 layers, `llamagen-cut` 2 of the 36.
The limit is that of vce_ray/sampling/plan.py, with bandwidth and arithmetic measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.devices import Device
from vce_ray.models.base import ImageModel
from vce_ray.models.janus import Janus
from vce_ray.models.llamagen.gpt import CAPTION_SLOTS, SIZES, GPTConfig, LlamaGenGPT
from vce_ray.models.llamagen.model import encode_features
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.sampling.compiled import StepKernels, step_kernels
from vce_ray.sampling.decoder import decoder_of
from vce_ray.sampling.measure import measure_device
from vce_ray.sampling.plan import plan

JANUS = {
    "janus-1b-cut": (4, 2048, 16, 5632),
    "janus-pro-1b": (24, 2048, 16, 5632),
    "janus-pro-7b": (30, 4096, 32, 11008),
}
"""Layers, width, heads and feed-forward width."""
LLAMAGEN = {"llamagen-cut": 2, "llamagen-xl": SIZES["XL"][0]}
"""Number of layers; the other sizes are those of XL."""
PROFILED = 128
"""Tokens per image drawn for a profile: the profiler needs memory for every operation."""
PRODUCTS = re.compile(r"linear|addmm|::mm|bmm|matmul|gemm|multiply|attend|attention")
"""Matches the names of operations that are matrix products or attention."""
KERNELS = ("step", "multiply", "gumbel")
"""Compiled functions shown in a profile."""
PROMPT = "a deer in the style of openmoji on a blue background"


def build(name: str, device: str, dtype: torch.dtype) -> ImageModel:
    """Load the embedded model, or make random weights of a released model's shape."""
    if name == EMBEDDED:
        return load_model(device=device, dtype=str(dtype).removeprefix("torch."))
    torch.manual_seed(0)
    if name in LLAMAGEN:
        _, heads, width = SIZES["XL"]
        layers = LLAMAGEN[name]
        return RandomLlamaGen(GPTConfig(layers, heads, width, 16_384, 256), device, dtype)
    layers, width, heads, feed_forward = JANUS[name]
    small = load_model(device="cpu")
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=102_400,
            hidden_size=width,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
        ),
        vision_config=JanusVisionConfig(num_image_tokens=576, projection_dim=width),
        vq_config=JanusVQVAEConfig(num_patches=24, projection_dim=width, image_token_embed_dim=width),
        image_token_id=small.net.config.image_token_id,
    )
    with torch.device(device):
        torch.set_default_dtype(dtype)
        net: Any = JanusForConditionalGeneration(config).eval()
        torch.set_default_dtype(torch.float32)
    net.generation_config = small.net.generation_config
    return Janus(net, small.processor, revision=name)


class RandomLlamaGen(ImageModel):
    """A LlamaGen with random weights and caption features, which draws tokens but decodes no pixels."""

    prompt_tokens = CAPTION_SLOTS

    def __init__(self, config: GPTConfig, device: str, dtype: torch.dtype):
        with torch.device(device):
            self.net = LlamaGenGPT(config).to(dtype).eval()
        self.revision, self.num_image_tokens = "random-llamagen", config.num_image_tokens
        self.image_vocab_size, self.image_size = config.vocab_size, config.image_size

    def encode_prompts(self, prompts: list[str]):
        """Make random features that depend on the prompt, one per character."""
        kind = {"device": self.device, "dtype": self.image_head.weight.dtype}
        features = torch.stack([_features(prompt) for prompt in prompts]).to(**kind)
        lengths = torch.tensor([min(len(prompt), CAPTION_SLOTS) for prompt in prompts], device=self.device)
        mask = torch.arange(CAPTION_SLOTS, device=self.device) >= CAPTION_SLOTS - lengths[:, None]
        return encode_features(self.net, features, mask)

    def embed_image_tokens(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.language_model.embed_tokens(tokens_BT)

    def decode_pixels(self, tokens_BT: torch.Tensor):
        raise NotImplementedError

    def caption(self, images, question=""):
        raise NotImplementedError


def _features(prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    return torch.randn(CAPTION_SLOTS, 2048, generator=generator)


def ours(model: ImageModel, batch: int, kv_cache: str) -> Callable[[], torch.Tensor]:
    """Return a call that draws with this project's decoder: full vocabulary, guidance 5."""
    sampling = SamplingConfig.model_validate({"batch_size": batch, "kv_cache_dtype": kv_cache})
    return lambda: draw(model, [PROMPT] * batch, list(range(batch)), sampling)


def theirs(model: ImageModel, batch: int) -> Callable[[], torch.Tensor] | None:
    """Return a call that draws with transformers' loop and the same settings; None for LlamaGen, which it lacks."""
    if not isinstance(model, Janus):
        return None
    inputs = model.processor(text=[PROMPT] * batch, generation_mode="image", return_tensors="pt").to(model.device)
    settings = {"generation_mode": "image", "do_sample": True, "top_k": 0, "guidance_scale": 5}
    return lambda: model.net.generate(**inputs, **settings)


def fits(work: Callable[[], Any]) -> bool:
    """Call once, as a warm-up, and return whether there was memory for it."""
    try:
        work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    model: ImageModel,
    name: str,
    batch: int,
    limits: Device,
    rounds: int,
    compiled: bool,
    kv_cache: str,
    ours_only: bool,
) -> dict[str, Any]:
    """Measure one row: the fastest round of each loop, and the share of the limit that ours reaches."""
    loops: dict[str, Callable[[], Any]] = {"ours": ours(model, batch, kv_cache)}
    if peer := None if ours_only else theirs(model, batch):
        loops["transformers"] = peer
    decoder_of(model).prepare()
    assert len(model.image_embeddings_VE) == model.image_vocab_size, "tabulated before memory is measured"
    before = peak_memory(reset=True) - decoder_of(model).cache_bytes  # the last batch's cache will be freed
    times: dict[str, list[float]] = {loop: [] for loop in loops}
    loops["ours"]()  # allocates the cache and compiles the kernels
    if len(decoder_of(model).cache(2 * batch)[0][0]) < 2 * batch:
        return {"model": name, "batch": batch, "dtype": model.shape.dtype, "kv_cache": kv_cache, "fits": False}
    peak = peak_memory() - before
    if peer and not fits(peer):
        del loops["transformers"], times["transformers"]
        peer = None
    for _ in range(rounds):
        for loop, work in loops.items():
            times[loop].append(seconds(work))
    if compiled and peer:
        stack = model.language_model
        model.net.model.language_model = torch.compile(stack)
        peer()
        times["transformers_compiled"] = [seconds(peer) for _ in range(rounds)]
        model.net.model.language_model = stack
    best = {loop: min(rounds_s) for loop, rounds_s in times.items()}
    prompt_tokens = model.encode_prompts([PROMPT]).mask_BP.shape[1]
    ideal = plan(replace(model.shape, prompt_tokens=prompt_tokens, kv_cache_dtype=kv_cache), limits, batch)
    row: dict[str, Any] = {"model": name, "batch": batch, "dtype": model.shape.dtype, "kv_cache": kv_cache}
    row |= {"ms_per_step": 1e3 * best["ours"] / model.num_image_tokens, "images_per_s": batch / best["ours"]}
    row |= {f"times_{loop}": best[loop] / best["ours"] for loop in best if loop != "ours"}
    row |= {"share_of_limit": ideal.batch_s / best["ours"], "bound": ideal.bound}
    return row | {"peak_gb": peak / 1e9, "planned_gb": (ideal.peak_bytes - ideal.weight_bytes) / 1e9}


def peak_memory(reset: bool = False) -> float:
    """Return the peak bytes in use, of the GPU or else this process, since the last reset; at a reset, those in use."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS" if reset else "VmHWM"].split()[0]) * 1024.0


def profile(work: Callable[[], Any]) -> str:
    """Profile one call: the self time of each operation, and the share of matrix products and attention."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with ExitStack() as stack:
        for name in KERNELS:  # the profiler does not see functions called through ctypes
            stack.enter_context(patch.object(StepKernels, name, _recorded(getattr(StepKernels, name))))
        profiler = stack.enter_context(torch.profiler.profile(activities=activities))
        work()
    averages = profiler.key_averages()
    self_time = {event.key: getattr(event, key) for event in averages}
    lines = [averages.table(sort_by=key, row_limit=15, max_name_column_width=60)]
    bound = sum(time for name, time in self_time.items() if PRODUCTS.search(name))
    if (kernels := step_kernels()) and (step := self_time.get("kernel step")):
        kernels.seconds = torch.zeros(3, dtype=torch.float64)
        work()
        parts = kernels.seconds / kernels.seconds.sum()
        kernels.seconds = None
        lines.append(f"of kernel step: norms {parts[0]:.1%}, products {parts[1]:.1%}, attention {parts[2]:.1%}")
        bound += step * parts[1:].sum().item()
    return "\n".join([*lines, f"matrix products and attention: {bound / sum(self_time.values()):.1%}"])


def _recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of StepKernels so that a profile shows it under its name."""

    @wraps(method)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"kernel {method.__name__}"):
            return method(*args, **kwargs)

    return recorded


def measure_model(
    name: str, args: argparse.Namespace, limits: Device, earlier: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of one model, or print a profile instead if asked to.

    Rows are printed and written after each batch, below `earlier` ones, so a run that is killed keeps them.
    """
    torch.set_num_threads(args.threads)
    model = build(name, "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype))
    rows = []
    for batch in args.batches:
        if args.profile:
            model.num_image_tokens = min(model.num_image_tokens, PROFILED)
            ours(model, batch, args.kv_cache)()
            print(profile(ours(model, batch, args.kv_cache)))
            continue
        row = measure(model, name, batch, limits, args.rounds, args.compiled, args.kv_cache, args.ours_only)
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        if args.out:
            write_rows(args.out, limits, earlier + rows)
    return rows


def write_rows(path: Path, limits: Device, rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON, with the machine and the versions of torch and transformers."""
    machine = {"device": limits.name, "bandwidth": limits.bandwidth, "arithmetic": limits.arithmetic}
    machine |= {"torch": torch.__version__, "transformers": transformers.__version__, "os": platform.platform()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def main() -> int:
    """Measure, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[EMBEDDED], choices=[EMBEDDED, *JANUS, *LLAMAGEN])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also measure transformers with torch.compile")
    parser.add_argument("--ours-only", action="store_true", help="do not measure transformers' loop")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    limits = measure_device(torch.device(device), dtype)
    print(f"{limits.name}: reads {limits.bandwidth / 1e9:.0f} GB/s, multiplies {limits.arithmetic / 1e9:.0f} Gflop/s")
    rows = []
    for name in args.models:  # each in its own process, so that memory left over from another is not measured
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows += process.submit(measure_model, name, args, limits, rows).result()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
