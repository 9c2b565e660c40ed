"""Where every rank sits -> host-major numbering, and the tables that show it. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.errors import TopologyError
from workloads.base import MeshSpec
from workloads.errors import first_few


@dataclass(frozen=True)
class Seat:
    """What a rank reports to the others, and where it sits."""

    rank: int
    """The scheduler's number."""
    host: str
    local_rank: int
    """The scheduler's number within the host."""
    device: str = "cpu"
    gpu: str = ""
    """What tells its GPU from every other; "" for none, or where that is not known."""

    def to_line(self) -> str:
        return json.dumps([self.rank, self.host, self.local_rank, self.device, self.gpu]) + "\n"

    @staticmethod
    def from_line(line: str) -> Seat:
        return Seat(*json.loads(line))


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


def number_by_host(seats: Sequence[Seat]) -> list[Seat]:
    """The seats in host-major order: the position in the list is the rank from there on.

    Hosts come in the order of their lowest scheduler rank, ranks within a host by local rank; so scheduler rank 0
    stays rank 0 wherever its host is in the scheduler's list.

    Raises:
        TopologyError: hosts hold unequal numbers of ranks (with the table of who sits where), devices differ, or ranks
            of a host share a GPU.
    """
    first: dict[str, int] = {}
    for seat in seats:
        first[seat.host] = min(seat.rank, first.get(seat.host, seat.rank))
    counts = Counter(seat.host for seat in seats)
    if len(set(counts.values())) > 1:
        raise TopologyError(
            "hosts hold unequal numbers of ranks, and a mesh needs equal ones; ask for --nodes and --gpus-per-node "
            "with one task per GPU. " + seat_table(seats)
        )
    devices = Counter(seat.device for seat in seats)
    if len(devices) > 1:
        raise TopologyError(
            "some ranks have a GPU and others do not: "
            + first_few(
                [
                    f"rank {s.rank} on {s.host}: {s.device}"
                    for s in sorted(seats, key=lambda s: (devices[s.device], s.rank))
                ]
            )
        )
    _refuse_shared_gpus(seats)
    # Rank 0 first even if its local rank is not 0 (it cannot be under any known launcher, but nothing rests on it).
    return sorted(seats, key=lambda seat: (first[seat.host], seat.rank != 0, seat.local_rank, seat.rank))


def _refuse_shared_gpus(seats: Sequence[Seat]) -> None:
    sharing: dict[tuple[str, str], list[int]] = {}
    for seat in sorted(seats, key=lambda seat: seat.rank):
        if seat.gpu:
            sharing.setdefault((seat.host, seat.gpu), []).append(seat.rank)
    shared = [
        f"ranks {first_few([*map(str, ranks)], 16, ' ')} on {host}: {gpu}"
        for (host, gpu), ranks in sharing.items()
        if len(ranks) > 1
    ]
    if shared:
        raise TopologyError(
            "several ranks of a host have the same GPU, and every rank needs one of its own: "
            + first_few(shared, between="; ")
            + "; ask for as many GPUs on each host as ranks (--gpus-per-node), or start fewer ranks"
        )


def place(hosts: Sequence[str], ranks: Sequence[int], scheduler_rank: int) -> Placement:
    """One rank's placement.

    Args:
        hosts: each once, in order.
        ranks: the scheduler's numbers in host-major order, equally many on each host.
        scheduler_rank: the rank's own.
    """
    per_node = len(ranks) // len(hosts)
    rank = ranks.index(scheduler_rank)
    of_each = [""] * len(ranks)
    for local_rank in range(per_node):  # not one by one, since each of thousands of ranks does this
        of_each[local_rank::per_node] = hosts
    return Placement(
        rank=rank,
        world_size=len(ranks),
        local_rank=rank % per_node,
        local_world_size=per_node,
        node_rank=rank // per_node,
        nodes=len(hosts),
        hosts=tuple(of_each),
    )


def seat_table(seats: Sequence[Seat], noun: str = "rank") -> str:
    """Who sits where, on one line: `node0: ranks 0 1 2; node1: rank 3`; of many hosts the odd ones."""
    by_host: dict[str, list[int]] = {}
    for seat in sorted(seats, key=lambda seat: seat.rank):
        by_host.setdefault(seat.host, []).append(seat.rank)
    hosts = list(by_host)
    if len(hosts) > 8:
        alike = Counter(len(ranks) for ranks in by_host.values())
        hosts.sort(key=lambda host: alike[len(by_host[host])])
    return first_few(
        [
            f"{host}: {noun}{'s' * (len(by_host[host]) > 1)} {first_few([*map(str, by_host[host])], 16, ' ')}"
            for host in hosts
        ],
        between="; ",
    )


WIDEST = 150
"""Characters of a line of the mesh's table."""


def mesh_table(spec: MeshSpec, hosts: Sequence[str]) -> str:
    """The mesh for people: hosts as rows, one cell a rank with its coordinates; of many, the first few and the last.

    If lines would be longer than WIDEST, coordinates are without the dimensions' names.

    Args:
        spec: the mesh.
        hosts: every host, in order; each holds equally many ranks.
    """
    columns = spec.world_size // len(hosts)
    shown = range(len(hosts)) if len(hosts) <= 8 else (0, 1, len(hosts) - 1)

    def cells_by_host(names: Sequence[str]) -> dict[str, list[str]]:
        rows: dict[str, list[str]] = {}
        for node in shown:
            for rank in range(node * columns, (node + 1) * columns):
                coordinates = " ".join(f"{n}{c}" for n, c in zip(names, spec.coordinate(rank), strict=True))
                rows.setdefault(hosts[node], []).append(f"{rank}: {coordinates}")
        return rows

    rows = cells_by_host(spec.names)
    if columns * (2 + max(len(cell) for cells in rows.values() for cell in cells)) > WIDEST:
        rows = cells_by_host([""] * len(spec.names))
    name_width = max(len("host"), *map(len, rows))
    cell_width = max(len(cell) for cells in rows.values() for cell in cells)
    header = f"{'host':<{name_width}}  " + "  ".join(
        f"{'gpu ' + str(column):<{cell_width}}" for column in range(columns)
    )
    lines = [header.rstrip()]
    for host, cells in rows.items():
        lines.append((f"{host:<{name_width}}  " + "  ".join(f"{cell:<{cell_width}}" for cell in cells)).rstrip())
    if len(hosts) > len(shown):
        lines.insert(-1, f"... {len(hosts) - len(shown):,} more hosts")
    return "\n".join(lines)
