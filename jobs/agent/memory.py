"""Whether the kernel's OOM killer has killed in this process's control group, which its children are in, too."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.machine import memory_groups


class OomCounter:
    """Counts the OOM kills in the control group of the process that makes it, from then on.

    The files: `memory.events` (cgroup v2, https://docs.kernel.org/admin-guide/cgroup-v2.html), which counts the groups
    below, too, and `memory.oom_control` (v1, since Linux 4.13).

    Args:
        own_groups: the groups that this process is in (cgroups(7)).
        mounted: where they are mounted.
    """

    def __init__(self, own_groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> None:
        names = {1: "memory.oom_control", 2: "memory.events"}
        self._files = [group / names[version] for _, group, version in memory_groups(own_groups, mounted)]
        if own_groups.exists() and not any(file.exists() for file in self._files):
            # In a container that has only its own part mounted, the upper part of the path is not there.
            self._files = [root / names[version] for root, _, version in memory_groups(own_groups, mounted)]
        self._before = self._count()

    def killed_since(self) -> int:
        """How many processes it has killed since this was made; 0 where the kernel does not tell."""
        return max(0, self._count() - self._before)

    def _count(self) -> int:
        return sum(map(_oom_kills, self._files))


def _oom_kills(file: Path) -> int:
    try:
        match = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0
