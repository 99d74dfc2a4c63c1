"""Memory limits of the container that this process runs in, from Linux control groups (cgroups), version 1 or 2.

A container sees the memory of the whole machine in /proc/meminfo, but is killed when it exceeds its own limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Version 1 reports no limit as the largest multiple of the page size in an int64."""


class MemoryLimit(NamedTuple):
    """The limit of one cgroup."""

    bytes: int
    free: float
    """Bytes that its processes can still allocate."""


class _Files(NamedTuple):
    """Names of the files of one version."""

    limit: str
    usage: str
    reclaimable: str
    """Key in memory.stat of the page cache that was not used lately."""


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Files("memory.max", "memory.current", "inactive_file")


def memory_limits(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> list[MemoryLimit]:
    """Return the memory limits of this process's cgroup and of its ancestors, which count too.

    Args:
        membership: lists the cgroup of this process in each hierarchy, as /proc/self/cgroup does. If it is missing,
            there are no limits.
        mount: where the hierarchies are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            limits += [_read_limit(folder, V1) for folder in _ancestors(mount / "memory", path)]
        elif number == "0":  # version 2; "unified" where both versions are mounted
            limits += [
                _read_limit(folder, V2) for root in (mount, mount / "unified") for folder in _ancestors(root, path)
            ]
    return [limit for limit in limits if limit is not None]


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    """Yield the folder of a cgroup and those above it, up to the root of its hierarchy.

    The path may be the one outside of the container, while its own cgroup is mounted as the root: then only the root
    exists. A path with "..", which is outside of the container's namespace, is treated the same way.
    """
    parts = [part for part in path.split("/") if part]
    for count in range(0 if ".." in parts else len(parts), -1, -1):
        yield root.joinpath(*parts[:count])


def _read_limit(folder: Path, files: _Files) -> MemoryLimit | None:
    """Return the limit of one cgroup; None if it has none or its files are missing."""
    try:
        limit, usage = int((folder / files.limit).read_text()), int((folder / files.usage).read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return None
    if limit >= UNLIMITED:
        return None
    # Usage includes the page cache. The kernel drops it before it refuses memory, and MemAvailable counts it as free:
    # otherwise, reading a checkpoint would seem to take its size in memory.
    return MemoryLimit(limit, float(max(0, limit - usage + _reclaimable(folder / "memory.stat", files.reclaimable))))


def _reclaimable(stat: Path, key: str) -> int:
    try:
        return int(dict(line.split() for line in stat.read_text().splitlines()).get(key, 0))
    except (OSError, ValueError):
        return 0
