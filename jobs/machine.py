"""This machine's GPUs, memory and kind of torch, without importing torch."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path


def gpu_count(env: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """GPUs that a process with this environment would see; 0 if the installed torch cannot use any.

    This is for messages and checks before the ranks start. The ranks ask torch itself.
    """
    if not torch_sees_gpus():
        return 0
    nvidia = len([p for p in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])
    amd = len(list((dev / "dri").glob("renderD*"))) if (dev / "kfd").exists() else 0
    present = nvidia or amd
    visible = env.get("CUDA_VISIBLE_DEVICES", env.get("HIP_VISIBLE_DEVICES"))
    if visible is None:
        return present
    listed = 0
    for part in visible.split(","):  # CUDA stops at the first entry that is not a device
        if not part.strip() or part.strip().startswith("-"):
            break
        listed += 1
    return min(present, listed)


def torch_sees_gpus() -> bool:
    """Whether the installed torch is a CUDA or ROCm build, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    try:
        text = version.read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None


def available_memory_bytes(own_groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory in bytes that new processes can use: what is free or reclaimable, within the limits of the control groups.

    The limit of every enclosing group counts: a batch system or a login session sets one far below the root.

    Args:
        own_groups: the file that lists this process's groups (cgroups(7)).
        mounted: where the groups are mounted.
    """
    limits: list[float] = [_available_by_kernel()]
    for root, group, version in memory_groups(own_groups, mounted):
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        # A container may mount only its own part of the tree, so the upper part of the path may not exist.
        limits += [_available_in(folder, *names) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return int(min(limits))


def memory_groups(
    own_groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> list[tuple[Path, Path, int]]:
    """The control groups that may limit this process's memory: each tree's root, the group's folder, the version.

    Args:
        own_groups: the file that lists this process's groups (cgroups(7)).
        mounted: where the groups are mounted.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for _, controllers, own in (line.split(":", 2) for line in lines):
        if controllers == "":
            groups.append((mounted, mounted / own.lstrip("/"), 2))
        elif "memory" in controllers.split(","):
            groups.append((mounted / "memory", mounted / "memory" / own.lstrip("/"), 1))
    return groups


def _available_in(group: Path, limit_file: str, used_file: str, reclaimable: str) -> float:
    """The memory that a control group has left; infinite if it sets no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in (limit_file, used_file))
        cached = re.search(rf"^{reclaimable} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return math.inf
    return max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)) if limit.isdigit() else math.inf


def _available_by_kernel() -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay")


def own_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system of a path, if it is one that other machines usually do not see; otherwise empty.

    Args:
        path: any absolute path.
        mounts: what is mounted where, as the kernel lists it.
    """
    try:
        lines = [line.split() for line in mounts.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    found = [(line[1], line[2]) for line in lines if len(line) > 2 and path.resolve().is_relative_to(line[1])]
    kind = max(found, key=lambda one: len(one[0]), default=("", ""))[1]
    return kind if kind in _OF_ONE_MACHINE else ""
