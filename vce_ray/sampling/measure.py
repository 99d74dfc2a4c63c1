"""Measure the limits of a device of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vce_ray.devices import Device
from vce_ray.sampling.compiled import step_kernels
from vce_ray.sampling.memory import free_memory


def measure_device(
    device: torch.device, dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.perf_counter
) -> Device:
    """Measure a device of this machine.

    The bandwidth is that of reading far more than its caches hold, the arithmetic that of a square matrix product.

    Args:
        dtype: dtype of the matrix product.
        clock: the time in seconds, read before and after each round.
    """
    on_gpu = device.type == "cuda"
    size = 1 << 30 if on_gpu else 1 << 28
    source = torch.ones(size // 4, device=device)
    read_s = _fastest(lambda: source.sum(), device, clock)
    edge = 8192 if on_gpu else 2048
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    multiply_s = _fastest(lambda: a @ b, device, clock)
    kernels = None if on_gpu or dtype != torch.float32 else step_kernels()
    if kernels is not None:
        packed = kernels.pack(b)
        multiply_s = min(multiply_s, _fastest(lambda: kernels.multiply(a, packed), device, clock))
    bandwidth, arithmetic = size / read_s, 2 * edge**3 / multiply_s
    if not on_gpu:
        name = f"this CPU, {torch.get_num_threads()} threads"
        return Device(name, free_memory(device), bandwidth, arithmetic, packs=kernels is not None)
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    capability = torch.cuda.get_device_capability(device)
    return Device(torch.cuda.get_device_name(device), memory, bandwidth, arithmetic, kind="gpu", capability=capability)


def _fastest(work: Callable[[], object], device: torch.device, clock: Callable[[], float], rounds: int = 7) -> float:
    """Return the seconds of the fastest of several rounds: other processes can only slow one down."""
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)
