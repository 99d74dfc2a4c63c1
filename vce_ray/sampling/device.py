"""What the device at hand can do: free memory, and bandwidth and arithmetic as measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from vce_ray.errors import UserError
from vce_ray.sampling.compiled import step_kernels
from vce_ray.sampling.plan import SLOT_BLOCK, Device


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken; infinite where the system does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024.0


def check_kept(kv_cache_dtype: str, device: torch.device) -> None:
    """Raises UserError where a GPU has no numbers of 8 bits and keys and values shall be such."""
    if kv_cache_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UserError(
            f"kv_cache_dtype fp8 wants a GPU of capability 8.9 or more, such as an L40S or H100, and {name} has "
            f"{capability[0]}.{capability[1]}: use auto"
        )


def measure_device(device: torch.device, dtype: torch.dtype = torch.float32) -> Device:
    """The device at hand: bandwidth of reading far more than its caches hold, arithmetic of a square matrix product."""
    on_gpu = device.type == "cuda"
    size = 1 << 30 if on_gpu else 1 << 28
    source = torch.ones(size // 4, device=device)
    read_s = _fastest(lambda: source.sum(), device)
    edge = 8192 if on_gpu else 2048
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    multiply_s = _fastest(lambda: a @ b, device)
    kernels = None if on_gpu or dtype != torch.float32 else step_kernels()
    if kernels is not None:
        packed = kernels.pack(b)
        multiply_s = min(multiply_s, _fastest(lambda: kernels.multiply(a, packed), device))
    memory = float(torch.cuda.get_device_properties(device).total_memory) if on_gpu else free_memory(device)
    name = torch.cuda.get_device_name(device) if on_gpu else f"this CPU, {torch.get_num_threads()} threads"
    return Device(
        name, memory, size / read_s, 2 * edge**3 / multiply_s, kernels is not None, SLOT_BLOCK if on_gpu else 1
    )


def _fastest(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Seconds of the fastest of several rounds: others on the machine only ever slow it."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)
