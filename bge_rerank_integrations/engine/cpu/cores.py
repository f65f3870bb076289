"""The number of CPU cores that the operating system allows this process to use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

_ROOT: Final = Path("/")


class UsableCores(NamedTuple):
    """A number of cores, and what sets it.

    Attributes:
        num_cores: Number of cores, at least 1.
        limited_by: What keeps the process from using all cores of the machine; None if nothing does.
    """

    num_cores: int
    limited_by: str | None


def usable_cores(root: Path = _ROOT) -> UsableCores:
    """Return how many cores this process may use: the lowest of its CPU affinity and its cgroups' quotas.

    A container with a CPU limit still sees every core of the machine. The kernel stops its threads once they
    have used their share of a period, so more threads than the quota slow each other down.

    Args:
        root: The folder that contains `proc/self` and the mounted cgroup file systems.
    """
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quota = cpu_quota(root)
    allowed = math.inf if quota is None else max(math.ceil(quota), 1)
    if allowed < affinity:
        return UsableCores(int(allowed), "the CPU quota of the cgroup")
    return UsableCores(affinity, "the CPU affinity of the process" if affinity < machine else None)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Return the lowest CPU quota of the process's cgroups and their parents, in cores; None for no limit.

    It reads cgroups of version 1 and 2. A machine may have both.

    Args:
        root: The folder that contains `proc/self` and the mounted cgroup file systems.
    """
    try:
        groups = _read(root / "proc/self/cgroup").splitlines()
        mounts = _read(root / "proc/self/mountinfo").splitlines()
    except OSError:  # not Linux, or `/proc` is hidden
        return None
    paths = dict(filter(None, map(_group, groups)))
    quotas = [
        quota
        for version, mount_root, mount_point in filter(None, map(_mount, mounts))
        if version in paths
        for folder in _folders(root / mount_point.lstrip("/"), mount_root, paths[version])
        if (quota := _READERS[version](folder)) is not None
    ]
    return min(quotas, default=None)


def _group(line: str) -> tuple[int, str] | None:
    """Return version and path of a cgroup with CPU limits, from `ID:CONTROLLERS:PATH`."""
    number, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if number == "0" and not controllers:
        return 2, path
    return (1, path) if "cpu" in controllers.split(",") else None


def _mount(line: str) -> tuple[int, str, str] | None:
    """Return version, root and mount point of a cgroup file system, from a line of `mountinfo`."""
    before, _, after = line.partition(" - ")
    fields, system = before.split(" "), after.split(" ")
    if len(fields) < 5 or len(system) < 3:
        return None
    place = _unescape(fields[3]), _unescape(fields[4])
    if system[0] == "cgroup2":
        return (2, *place)
    return (1, *place) if system[0] == "cgroup" and "cpu" in system[2].split(",") else None


def _folders(mount_point: Path, mount_root: str, group: str) -> Iterator[Path]:
    """Yield the folder of each cgroup from the mount point down to the process's own cgroup.

    A container often sees its own cgroup as the root of the mount. A path outside that root is not visible,
    so only the mount point is left.
    """
    yield mount_point
    try:
        below = PurePosixPath(group).relative_to(mount_root)
    except ValueError:
        return
    if ".." not in below.parts:
        yield from (mount_point.joinpath(*below.parts[:depth]) for depth in range(1, len(below.parts) + 1))


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = int(_read(folder / "cpu.cfs_quota_us")), int(_read(folder / "cpu.cfs_period_us"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None  # -1 means no limit


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = map(int, _read(folder / "cpu.max").split())
    except (OSError, ValueError):  # the root cgroup has no such file, and `max` means no limit
        return None
    return quota / period if quota > 0 and period > 0 else None


_READERS: Final = {1: _quota_v1, 2: _quota_v2}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _unescape(path: str) -> str:
    """Return a path of `mountinfo`, where the kernel writes white space and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
