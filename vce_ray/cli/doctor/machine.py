"""Checks this machine: versions, torch, GPUs, the compiler, memory."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from vce_ray.cli.doctor.check import Asked, Check

if TYPE_CHECKING:
    from vce_ray.sampling.memory import HostMemory


_GET_COMPILER = "install a C++ compiler (apt-get install g++)"


def versions(_: Asked) -> Iterator[Check]:
    """Check Python and the installed packages against the requirements of this one."""
    yield check_versions(metadata.requires("vce_ray") or [], metadata.metadata("vce_ray")["Requires-Python"])


def torch(_: Asked) -> Iterator[Check]:
    """Check that torch and torchvision were built for each other."""
    yield check_torchvision()


def gpu(_: Asked) -> Iterator[Check]:
    """List the GPUs."""
    yield check_gpus()


def compiler(_: Asked) -> Iterator[Check]:
    """Check that there is a compiler for the kernels of this machine's device."""
    import torch

    yield check_triton_compiler() if torch.cuda.is_available() else check_step_compiler()


def memory(asked: Asked) -> Iterator[Check]:
    """Check that the base fits into memory."""
    import torch

    from vce_ray.sampling.memory import free_memory, host_memory

    if torch.cuda.is_available():
        yield check_memory(asked.base, free_memory(torch.device("cuda")), "the GPU")
    else:
        yield check_host_memory(asked.base, host_memory())


def shared_memory(_: Asked) -> Iterator[Check]:
    """Check the size of /dev/shm. On systems without it, Ray does not use it."""
    if Path("/dev/shm").exists():
        yield check_shared_memory(shutil.disk_usage("/dev/shm").free)


def check_versions(requirements: Iterable[str], python: str) -> Check:
    """Check Python and the installed packages against a package's requirements, without its extras."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(python).contains(platform.python_version()):
        return Check("versions", False, f"Python {platform.python_version()}", f"recreate .venv with Python {python}")
    required = [
        item for item in map(Requirement, requirements) if not item.marker or item.marker.evaluate({"extra": ""})
    ]
    wrong = {}
    for requirement in required:
        try:
            version = metadata.version(requirement.name)
            satisfied = requirement.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, satisfied = "missing", False
        if not satisfied:
            wrong[f"'{requirement}'"] = f"{requirement.name} {version}"
    if wrong:
        return Check("versions", False, ", ".join(wrong.values()), f"pip install {' '.join(wrong)}")
    return Check("versions", True, f"Python {platform.python_version()} and all {len(required)} required packages")


def check_torchvision() -> Check:
    """Check that torch and torchvision were built for each other; otherwise importing torchvision fails."""
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "install torch and torchvision of the same release from the same index, as constraints.txt does"
        return Check("torch", False, found, fix)
    return Check("torch", True, f"torch {torch.__version__} and torchvision {torchvision.__version__} are compatible")


def check_gpus() -> Check:
    """List the GPUs that torch sees. Always ok: a run works without."""
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in devices]
    return Check("gpu", True, f"{len(names)}: {', '.join(names)}" if names else "CPU only")


def check_step_compiler() -> Check:
    """Compile the sampling step of CPUs. Without it a run works, at about half the speed."""
    from vce_ray.env import COMPILE
    from vce_ray.sampling.compiled import CompileError, build_kernels, find_compiler

    if not COMPILE.get():
        return Check("compiler", True, f"not used: {COMPILE.name} is 0")
    if (found := find_compiler()) is None:
        return Check("compiler", True, "no C++ compiler: sampling on this CPU takes about twice as long", _GET_COMPILER)
    try:
        build_kernels()
    except CompileError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        return Check("compiler", True, f"{found} cannot compile the sampling step: {reason.strip()}", _GET_COMPILER)
    return Check("compiler", True, f"{found} compiles the sampling step")


def check_triton_compiler() -> Check:
    """Check that Triton finds a C compiler and Python's headers, with which it builds its launcher on first use."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        return Check("compiler", True, "no C compiler, which Triton needs: sampling is slower without", _GET_COMPILER)
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.exists():
        fix = "install the headers of this Python (apt-get install python3-dev)"
        return Check("compiler", True, f"{headers} is missing, which Triton needs: sampling is slower without", fix)
    return Check("compiler", True, f"{found}, for Triton")


def check_host_memory(base: str, memory: HostMemory) -> Check:
    """Check memory on a machine without GPUs, where a container's limit may be less than the machine has."""
    if memory.limit is None:
        return check_memory(base, memory.free, "this machine")
    check = check_memory(base, memory.free, f"this container, limited to {memory.limit / 1e9:.2f} GB,")
    return check if check.ok else replace(check, fix="raise the container's memory limit, or use a smaller --base")


def check_memory(base: str, free: float, device: str) -> Check:
    """Check that a base model and one image, sampled with guidance, fit into `free` bytes.

    The needs of large models are known only for the shapes in models/shape.py; no large model is loaded to find out.
    """
    from vce_ray.config import EMBEDDED
    from vce_ray.models.load import load_model
    from vce_ray.models.shape import SHAPES
    from vce_ray.sampling.plan import needed_memory

    name = Path(base.partition("@")[0]).name.lower()  # of a hub id or a path
    if base != EMBEDDED and name not in SHAPES:
        return Check("memory", True, f"not checked: memory needs are known only for {EMBEDDED}, {', '.join(SHAPES)}")
    shape = load_model(device="cpu").shape if base == EMBEDDED else SHAPES[name]
    needed = needed_memory(shape)
    available = "has an unknown amount free" if free == float("inf") else f"has {free / 1e9:.2f} GB free"
    fix = "" if free >= needed else "use a smaller --base, or a device with more memory (see vce-ray plan)"
    found = f"{name} needs {needed / 1e9:.2f} GB for one image, {device} {available}"
    return Check("memory", free >= needed, found, fix)


def check_shared_memory(free: float, recommended: float = 2e9) -> Check:
    """Warn if /dev/shm is too small for Ray's object store, which then uses the disk."""
    fix = "enlarge /dev/shm (docker run --shm-size=8g); otherwise Ray keeps its object store on disk"
    found = f"{free / 1e9:.1f} GB free in /dev/shm"
    return Check("shared memory", True, found, fix if free < recommended else "")
