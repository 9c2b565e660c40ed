"""Which CPUs each rank of a host gets: an equal share each, near its GPU where the kernel tells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.spec import CpuBinding
from workloads.errors import first_few


@dataclass(frozen=True)
class Host:
    """What the kernel says of this host's CPUs and GPUs."""

    own: frozenset[int]
    """CPUs that this process may run on as it is."""
    allowed: frozenset[int]
    """CPUs that it could choose from: those of its cpuset."""
    online: frozenset[int]
    cores: Mapping[int, int] = field(default_factory=dict)
    """CPU -> the lowest CPU of its core; a CPU that is missing is a core of its own."""
    nodes: Mapping[int, int] = field(default_factory=dict)
    """CPU -> NUMA node; a CPU that is missing is on node 0."""
    gpu_nodes: tuple[int | None, ...] = ()
    """The NUMA node of each GPU that a rank sees, in the order of their numbers; None where the kernel cannot tell."""


def plan(
    env: Mapping[str, str], ranks: int, binding: CpuBinding, host: Host | None = None
) -> tuple[list[set[int]] | None, str]:
    """Which CPUs each rank of this host gets, and one sentence for the log that says how.

    Every rank calls os.sched_setaffinity(0, its set) before it imports or computes anything; None: it calls nothing.

    Where the CPUs are this job's alone (Slurm gave all of them to the step, or a cpuset holds it) they are divided
    among the ranks. Where other jobs may run on them, too, a rank pinned beside another job's pinned rank would be
    slower than a free one: there it is bound to the whole NUMA node of its GPU, or not at all.

    Slurm may have bound the agent itself to fewer CPUs than it gave the step: to one task's default, or by a
    SLURM_CPU_BIND inherited from the step that the job was submitted from. That binding is lifted, also under `none`.

    Args:
        env: the variables of the agent's own Slurm step, and CUDA's; without SLURM_CPUS_ON_NODE outside of a step.
        ranks: how many ranks run on this host, those of all emulated hosts together.
        binding: the cluster config's `cpu_binding`.
        host: what the kernel says; read from it where it is not given.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None, "CPUs: not bound, since this system cannot"
    host = host or read_host(env)
    granted = int(text) if (text := env.get("SLURM_CPUS_ON_NODE", "")).isdecimal() else None
    lifted = granted is not None and len(host.own) < min(granted, len(host.allowed))
    cpus = host.allowed if lifted else host.own
    shared = [set(cpus)] * ranks if lifted else None
    free = f"CPUs: not bound, the ranks share {_ranges(cpus)}"
    if lifted:
        free += f" (the agent was bound to {_ranges(host.own)})"
    if binding == "none":
        return shared, f"{free}: cpu_binding is none"
    gpu_nodes = _gpu_node_of_each(ranks, host.gpu_nodes, is_slurm=granted is not None)
    alone = granted is not None and (len(cpus) <= granted or cpus < host.online)
    near_gpus = any(node is not None for node in gpu_nodes) and len({host.nodes.get(cpu, 0) for cpu in cpus}) > 1
    if not alone:
        if not near_gpus:
            return shared, f"{free}: other jobs may run on them, too"
        by_node = [{cpu for cpu in cpus if host.nodes.get(cpu, 0) == node} or set(cpus) for node in gpu_nodes]
        return by_node, f"CPUs: each rank is bound to the NUMA node of its GPU: {_shown(by_node)}"
    parts = bind(cpus, ranks, host.cores, host.nodes, gpu_nodes)
    if parts is None:
        return shared, f"{free}: fewer than {ranks} ranks"
    near = sum(
        node is not None and all(host.nodes.get(cpu, 0) == node for cpu in part)
        for node, part in zip(gpu_nodes, parts, strict=True)
    )
    where = f" ({near} of {ranks} ranks have only CPUs of their GPU's NUMA node)" if near_gpus else ""
    return parts, f"CPUs: each rank is bound to its own{where}: {_shown(parts)}"


def bind(
    cpus: Iterable[int],
    ranks: int,
    cores: Mapping[int, int],
    nodes: Mapping[int, int],
    gpu_nodes: Sequence[int | None],
) -> list[set[int]] | None:
    """Divides CPUs among the ranks of a host. Pure.

    Each rank gets the same number of cores, the first ranks one more where they do not divide; of its GPU's NUMA node
    as far as that has enough for all ranks with GPUs there. A core is split between ranks only where there are fewer
    cores than ranks.

    Args:
        cpus: CPUs to divide; each is used at most once.
        ranks: how many ranks.
        cores: CPU -> the lowest CPU of its core; a CPU that is missing is a core of its own.
        nodes: CPU -> NUMA node; a CPU that is missing is on node 0.
        gpu_nodes: the NUMA node of each rank's GPU, None where there is none or it is not known.

    Returns:
        The CPUs of each rank; None where there are fewer CPUs than ranks.
    """
    cpus = sorted(cpus)
    if len(cpus) < ranks:
        return None
    by_core: dict[int, set[int]] = {}
    for cpu in cpus:
        by_core.setdefault(cores.get(cpu, cpu), set()).add(cpu)
    whole = len(by_core) >= ranks
    units = list(by_core.values()) if whole else [{cpu} for core in by_core.values() for cpu in sorted(core)]
    pools: dict[int, list[set[int]]] = {}
    for unit in units:
        pools.setdefault(nodes.get(min(unit), 0), []).append(unit)

    due = _shares(len(units), ranks)
    parts: list[list[set[int]]] = [[] for _ in range(ranks)]
    for node, pool in pools.items():
        there = [rank for rank in range(ranks) if gpu_nodes[rank] == node]
        for rank, share in zip(there, _shares(len(pool), len(there)), strict=True):
            count = min(share, due[rank])
            parts[rank], pool[:count] = pool[:count], []
    rest = [unit for node in sorted(pools) for unit in pools[node]]
    for rank, part in enumerate(parts):
        count = due[rank] - len(part)
        part += rest[:count]
        del rest[:count]
    return [set().union(*part) for part in parts]


def _shares(count: int, among: int) -> list[int]:
    """`count` things divided evenly, the first getting one more where they do not divide."""
    return [count // among + (i < count % among) for i in range(among)]


def _gpu_node_of_each(ranks: int, gpu_nodes: Sequence[int | None], *, is_slurm: bool) -> list[int | None]:
    """The NUMA node of the GPU that each rank takes (`jobs.rank.devices.choose_device`)."""
    if not gpu_nodes or (len(gpu_nodes) < ranks and not is_slurm):
        return [None] * ranks
    return [gpu_nodes[rank % len(gpu_nodes)] for rank in range(ranks)]


# --- reading the kernel -----------------------------------------------------------------------------------------------


def read_host(env: Mapping[str, str], root: Path = Path("/")) -> Host:
    """Reads /sys and /proc, with whatever is missing there left out.

    Args:
        env: with CUDA's variables.
        root: where these two and /dev lie.
    """
    own = frozenset(os.sched_getaffinity(0))
    system = root / "sys/devices/system"
    online = _cpu_list(system / "cpu/online") or own
    cores = {
        cpu: min(siblings)
        for cpu in online
        if (siblings := _cpu_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list"))
    }
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (system / "node").glob("node[0-9]*")
        for cpu in _cpu_list(folder / "cpulist")
    }
    return Host(own, _allowed(own, online), online, cores, nodes, visible_gpu_nodes(env, root))


def _allowed(own: frozenset[int], online: frozenset[int]) -> frozenset[int]:
    """The CPUs of this process's cpuset: the kernel takes a wish for all of them as one for those (sched(7))."""
    try:
        os.sched_setaffinity(0, online | own)
        return frozenset(os.sched_getaffinity(0))
    except OSError:
        return own
    finally:
        os.sched_setaffinity(0, own)


def visible_gpu_nodes(env: Mapping[str, str], root: Path = Path("/")) -> tuple[int | None, ...]:
    """The NUMA nodes of the NVIDIA GPUs that a rank sees, in the order of CUDA's numbers.

    The numbers are those of CUDA_DEVICE_ORDER=PCI_BUS_ID, among the GPUs whose device file a process here may open.
    CUDA's default is FASTEST_FIRST, which differs only on a host whose GPUs are of different kinds. Nothing is said
    of a rank kept off GPUs (MESHRUN_DEVICE), nor of GPUs that CUDA_VISIBLE_DEVICES names by UUID.
    """
    if env.get("MESHRUN_DEVICE"):
        return ()
    found: list[int | None] = []
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*:*:*")):
        minor = re.search(r"^Device Minor:\s*(\d+)$", _text(folder / "information"), re.MULTILINE)
        if minor and os.access(root / f"dev/nvidia{minor[1]}", os.R_OK | os.W_OK):  # a device cgroup counts here, too
            node = _text(root / "sys/bus/pci/devices" / folder.name.lower() / "numa_node").strip()
            found.append(int(node) if node.isdecimal() else None)  # -1: the firmware does not tell
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found)
    chosen: list[int | None] = []
    for part in map(str.strip, visible.split(",")):
        if not part.isdecimal() or int(part) >= len(found):  # CUDA stops at the first entry that is not a device
            return () if part.startswith(("GPU-", "MIG-")) else tuple(chosen)
        chosen.append(found[int(part)])
    return tuple(chosen)


def _cpu_list(path: Path) -> frozenset[int]:
    """The CPUs in a file of the kernel's, such as `0-3,8`; none where there is no such file."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", _text(path))
    return frozenset(cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1))


def _shown(parts: Sequence[set[int]]) -> str:
    return first_few([f"rank {rank} to {_ranges(part)}" for rank, part in enumerate(parts)])


def _ranges(cpus: Iterable[int]) -> str:
    """CPUs as the kernel writes them: `0-3,8`."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
