"""Who am I among the ranks: environment variables -> RankInfo, and all RankInfos -> host-major numbering. Pure.

Three launchers are understood, in this order:

* meshrun's own local executor, which emulates hosts on one box (`MESHRUN_*`);
* a Slurm step (`SLURM_*` as srun sets them, https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES);
* torchrun (`RANK`, `WORLD_SIZE`, ..., https://pytorch.org/docs/stable/elastic/run.html#environment-variables).

The scheduler's rank is only a name to begin with. Ranks are renumbered host by host before the process group exists,
so that every mesh is in plain order and its innermost groups lie within hosts. (Leaving the ranks as they come and
permuting the mesh instead gives wrong gathered weights under right losses.)
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jobs.errors import TopologyError
from workloads.base import MeshSpec

Launcher = Literal["local", "slurm", "torchrun"]

MOST_RANKS = 10_000_000
"""A larger number in a launcher's variable is garbage, and would only fill the memory."""


@dataclass(frozen=True)
class RankInfo:
    """What one rank knows of itself before it has talked to any other."""

    launcher: Launcher
    rank: int
    """The scheduler's number."""
    world_size: int
    local_rank: int
    """The scheduler's number within the host."""
    local_world_size: int
    """Ranks on this host."""
    host: str
    """What tells hosts apart: the scheduler's name of this node."""
    job_id: str
    step_id: str = ""
    """The scheduler's number of this step of the job; "" where a job has no steps."""
    attempt: int = 0
    """0 at first, one more after each requeue or restart."""
    node_rank: int | None = None
    """The host's number as the scheduler says, for the log only: under some distributions it is not ours."""
    expected_hosts: tuple[str, ...] = ()
    """The host of every rank, where the scheduler tells; used to say where a missing rank should be."""
    master_addr: str | None = None
    """Where a store already waits (torchrun); otherwise rank 0 opens one."""
    master_port: int | None = None
    network_peer: str | None = None
    """An address on the cluster's own network, as the scheduler uses it: the way there leads to the other hosts too.
    Never a loopback one."""

    @property
    def identity(self) -> str:
        """What no other job, step or attempt shares, and all ranks of this one do: `123.0-1`."""
        return f"{self.job_id}{self.step_id and '.' + self.step_id}-{self.attempt}"

    @staticmethod
    def from_env(env: Mapping[str, str]) -> RankInfo:
        """The rank that these variables describe.

        Raises:
            TopologyError: they name no rank, or contradict themselves; says which variable and what to do.
        """
        if "MESHRUN_PROCID" in env:
            return _from_local(env)
        if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
            return _from_slurm(env)
        if "RANK" in env and "WORLD_SIZE" in env:
            return _from_torchrun(env)
        if "SLURM_JOB_ID" in env:
            raise TopologyError(
                f"job {env['SLURM_JOB_ID']} is allocated but this process is not one of its ranks "
                "(SLURM_STEP_ID or SLURM_PROCID is not set); start it with `srun`, or submit with `submit.py`"
            )
        raise TopologyError(
            "no launcher's variables are set (SLURM_PROCID, RANK); start with submit.py, srun or torchrun, "
            "or use --executor debug for one rank in this process"
        )


def local_env(rank: int, nodes: int, ranks_per_node: int, job_id: str, attempt: int = 0) -> dict[str, str]:
    """The variables by which the local executor tells a rank its place; the inverse of `RankInfo.from_env`."""
    node = rank // ranks_per_node
    return {
        "MESHRUN_PROCID": str(rank),
        "MESHRUN_NTASKS": str(nodes * ranks_per_node),
        "MESHRUN_LOCALID": str(rank % ranks_per_node),
        "MESHRUN_NODEID": str(node),
        "MESHRUN_NNODES": str(nodes),
        "MESHRUN_NODENAME": f"host{node}",
        "MESHRUN_JOB_ID": job_id,
        "MESHRUN_RESTART_COUNT": str(attempt),
    }


def _from_local(env: Mapping[str, str]) -> RankInfo:
    world_size, nodes = _int(env, "MESHRUN_NTASKS", 1), _int(env, "MESHRUN_NNODES", 1)
    per_node = world_size // nodes
    if per_node * nodes != world_size:
        raise TopologyError(
            f"MESHRUN_NTASKS={world_size} over MESHRUN_NNODES={nodes}: the launcher's variables contradict themselves"
        )
    return _checked(
        RankInfo(
            launcher="local",
            rank=_int(env, "MESHRUN_PROCID"),
            world_size=world_size,
            local_rank=_int(env, "MESHRUN_LOCALID"),
            local_world_size=per_node,
            host=_text(env, "MESHRUN_NODENAME"),
            job_id=_text(env, "MESHRUN_JOB_ID"),
            attempt=_int(env, "MESHRUN_RESTART_COUNT", default=0),
            node_rank=_int(env, "MESHRUN_NODEID"),
            expected_hosts=tuple(f"host{rank // per_node}" for rank in range(world_size)),
        )
    )


def _from_slurm(env: Mapping[str, str]) -> RankInfo:
    # The step's own variables only: SLURM_NTASKS_PER_NODE, SLURM_JOB_NUM_NODES and SLURM_NODELIST are the job's and
    # wrong for a step on part of it; SLURM_NODEID is not the order in which hosts hold ranks.
    world_size = _int(env, "SLURM_STEP_NUM_TASKS", 1) if "SLURM_STEP_NUM_TASKS" in env else _int(env, "SLURM_NTASKS", 1)
    local_ids = env.get("SLURM_GTIDS", "")
    counts = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"]) if "SLURM_STEP_TASKS_PER_NODE" in env else []
    expected: tuple[str, ...] = ()
    if env.get("SLURM_DISTRIBUTION", "") == "block" and counts and "SLURM_STEP_NODELIST" in env:
        hosts = expand_hosts(env["SLURM_STEP_NODELIST"])
        if len(hosts) == len(counts):
            expected = tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))
    if len(expected) != world_size:
        expected = ()
    return _checked(
        RankInfo(
            launcher="slurm",
            rank=_int(env, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_int(env, "SLURM_LOCALID"),
            local_world_size=len(local_ids.split(",")) if local_ids else world_size,
            # Several slurmd may share one host's name; SLURMD_NODENAME tells them apart.
            host=_text(env, "SLURMD_NODENAME"),
            job_id=_text(env, "SLURM_JOB_ID"),
            step_id=_text(env, "SLURM_STEP_ID"),
            attempt=_int(env, "SLURM_RESTART_COUNT", default=0),
            node_rank=_int(env, "SLURM_NODEID", default=0),
            expected_hosts=expected,
            network_peer=_peer(env.get("SLURM_LAUNCH_NODE_IPADDR", "")),
        )
    )


def _from_torchrun(env: Mapping[str, str]) -> RankInfo:
    world_size = _int(env, "WORLD_SIZE", 1)
    group = env.get("GROUP_RANK", "0")
    return _checked(
        RankInfo(
            launcher="torchrun",
            rank=_int(env, "RANK"),
            world_size=world_size,
            local_rank=_int(env, "LOCAL_RANK", default=0),
            local_world_size=_int(env, "LOCAL_WORLD_SIZE", 1, default=world_size),
            # One agent, one group of ranks: its number tells hosts (and agents that share one) apart.
            host=f"node{group}",
            job_id=env.get("TORCHELASTIC_RUN_ID") or "torchrun",
            attempt=_int(env, "TORCHELASTIC_RESTART_COUNT", default=0),
            node_rank=int(group) if re.fullmatch(r"[0-9]{1,9}", group) else None,
            master_addr=_text(env, "MASTER_ADDR"),
            master_port=_int(env, "MASTER_PORT", 1, most=65535),
        )
    )


def _checked(info: RankInfo) -> RankInfo:
    if info.rank >= info.world_size:
        raise TopologyError(f"rank {info.rank} of {info.world_size}: the launcher's variables contradict themselves")
    if info.local_rank >= info.local_world_size or info.local_world_size > info.world_size:
        raise TopologyError(
            f"local rank {info.local_rank} of {info.local_world_size} on {info.host}, {info.world_size} in all: "
            "the launcher's variables contradict themselves"
        )
    return info


def _peer(text: str) -> str | None:
    """The address, if it is one that another host can be reached by."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    plain = getattr(address, "ipv4_mapped", None) or address
    return None if plain.is_loopback or plain.is_unspecified or plain.is_multicast else str(plain)


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise TopologyError(f"{name} is not set beside the launcher's other variables; was it unset by hand?")
    return value


def _int(env: Mapping[str, str], name: str, least: int = 0, default: int | None = None, most: int = MOST_RANKS) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
        raise TopologyError(f"{name}='{text[:40]}': expected a whole number from {least} to {most}")
    return int(text)


def expand_counts(text: str) -> list[int]:
    """SLURM_TASKS_PER_NODE: `4(x2),1` -> [4, 4, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:\(x([0-9]{1,7})\))?", part)
        if not match or len(counts) > MOST_RANKS:
            raise TopologyError(f"SLURM_STEP_TASKS_PER_NODE='{text}': expected counts such as 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str) -> list[str]:
    """SLURM_NODELIST: `rack[1-2]-n[01-02],gpu7` -> every host, in order."""
    # submitit's parser gets multi-dimensional lists right; it is private, so its version is bounded in pyproject.toml.
    from submitit.slurm.slurm import SlurmParseException, _parse_node_list

    try:
        return list(_parse_node_list(text))
    except SlurmParseException:
        raise TopologyError(f"node list '{text}': cannot be read") from None


# --- numbering --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seat:
    """What a rank reports to the others, and where it sits."""

    rank: int
    """The scheduler's number."""
    host: str
    local_rank: int
    """The scheduler's number within the host."""
    pid: int = 0
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Placement:
    """A rank's place in the host-major numbering, the only numbering used from there on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: int
    hosts: tuple[str, ...]
    """The host of every rank."""
    scheduler_rank: int


def number_by_host(seats: Sequence[Seat]) -> list[Seat]:
    """The seats in host-major order: the position in the list is the rank from there on.

    Hosts come in the order of their lowest scheduler rank, ranks within a host by local rank; so scheduler rank 0
    stays rank 0 wherever its host is in the scheduler's list.

    Raises:
        TopologyError: hosts hold unequal numbers of ranks (with the table of who sits where), or devices differ.
    """
    first: dict[str, int] = {}
    for seat in seats:
        first[seat.host] = min(seat.rank, first.get(seat.host, seat.rank))
    counts = Counter(seat.host for seat in seats)
    if len(set(counts.values())) > 1:
        raise TopologyError(
            "hosts hold unequal numbers of ranks, and a mesh needs equal ones; ask for --nodes and --gpus-per-node "
            "with one task a GPU. " + seat_table(seats)
        )
    devices = Counter(seat.device for seat in seats)
    if len(devices) > 1:
        raise TopologyError(
            "some ranks have a GPU and others do not: "
            + ", ".join(f"rank {s.rank} on {s.host}: {s.device}" for s in sorted(seats, key=lambda s: s.rank))
        )
    # Rank 0 first even if its local rank is not 0 (it cannot be under any known launcher, but nothing rests on it).
    return sorted(seats, key=lambda seat: (first[seat.host], seat.rank != 0, seat.local_rank, seat.rank))


def place(seats: Sequence[Seat], scheduler_rank: int) -> Placement:
    """One rank's placement among the seats in host-major order."""
    hosts = tuple(seat.host for seat in seats)
    nodes = len(set(hosts))
    per_node = len(seats) // nodes
    rank = next(index for index, seat in enumerate(seats) if seat.rank == scheduler_rank)
    return Placement(
        rank=rank,
        world_size=len(seats),
        local_rank=rank % per_node,
        local_world_size=per_node,
        node_rank=rank // per_node,
        nodes=nodes,
        hosts=hosts,
        scheduler_rank=scheduler_rank,
    )


def seat_table(seats: Sequence[Seat]) -> str:
    """Who sits where, on one line: `node0: ranks 0 1 2; node1: rank 3`."""
    by_host: dict[str, list[int]] = {}
    for seat in sorted(seats, key=lambda seat: seat.rank):
        by_host.setdefault(seat.host, []).append(seat.rank)
    return "; ".join(
        f"{host}: {'rank' if len(ranks) == 1 else 'ranks'} {' '.join(map(str, ranks))}"
        for host, ranks in by_host.items()
    )


def mesh_table(spec: MeshSpec, hosts: Sequence[str]) -> str:
    """The mesh for people: hosts as rows, one cell a rank with its coordinates.

    Args:
        spec: the mesh.
        hosts: the host of every rank, host-major.
    """
    rows: dict[str, list[str]] = {}
    for rank, host in enumerate(hosts):
        coordinates = " ".join(f"{n}{c}" for n, c in zip(spec.names, spec.coordinate(rank), strict=True))
        rows.setdefault(host, []).append(f"{rank}: {coordinates}")
    name_width = max(len("host"), *map(len, rows))
    cell_width = max(len(cell) for cells in rows.values() for cell in cells)
    columns = len(next(iter(rows.values())))
    header = f"{'host':<{name_width}}  " + "  ".join(
        f"{'gpu ' + str(column):<{cell_width}}" for column in range(columns)
    )
    lines = [header.rstrip()]
    for host, cells in rows.items():
        lines.append((f"{host:<{name_width}}  " + "  ".join(f"{cell:<{cell_width}}" for cell in cells)).rstrip())
    return "\n".join(lines)
