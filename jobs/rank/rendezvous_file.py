"""The rendezvous file, in which the first of a job's ranks, or of its agents, says where it listens.

And what is said where that comes to nothing, for ranks and agents alike. Without torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import MeshrunError
from jobs.rank.identity import RankInfo
from jobs.rank.numbering import Seat, seat_table
from jobs.run_dir import read_json, write_json
from workloads.errors import first_few


def first_of(info: RankInfo) -> str:
    """Rank 0, with its host where the scheduler tells."""
    return f"{info.noun} 0" + (f" on {info.expected_hosts[0]}" if info.expected_hosts else "")


@contextlib.contextmanager
def failing_for_all(info: RankInfo, rendezvous_file: Path) -> Iterator[None]:
    """What prevents the first one from listening is written where the others look for it."""
    try:
        yield
    except MeshrunError as error:
        write_json(rendezvous_file, {"identity": info.identity, "host": info.host, "error": str(error)})
        raise


def read_rendezvous_file(rendezvous_file: Path) -> dict[str, Any] | None:
    """What it says; None while there is none."""
    try:
        # Opening the directory makes an NFS client look again instead of answering from its cache.
        os.close(os.open(rendezvous_file.parent, os.O_RDONLY))
        return read_json(rendezvous_file)
    except OSError:  # ESTALE: another file has taken its name since it was opened
        return None


# --- what is said of whoever should have announced itself -------------------------------------------------------------


def first_is_missing(info: RankInfo, rendezvous_file: Path, others: str, timeout_s: float) -> str:
    """There is no announcement, or only that of `others`."""
    still = f", which is still that of {others}" if others else ""
    return (
        f"missing: {first_of(info)}, which has not announced itself within {timeout_s:g} s (by {rendezvous_file}"
        f"{still}); is it still starting, and does it see the same file system?"
    )


def announced(info: RankInfo, where: dict[str, Any], problem: str) -> str:
    """There is one, but a problem with it."""
    return f"{info.noun} 0 announced {where['address']}:{where['port']} on {where['host']}, {problem}"


def unreachable(info: RankInfo, error: OSError) -> str:
    """The problem that nothing is reached there."""
    return (
        f"but it cannot be reached from here ({error.strerror or error}): {info.noun} 0 is gone, or a firewall is in "
        "between (set interface or rendezvous_ports in the cluster config)"
    )


def some_are_missing(info: RankInfo, seats: Sequence[Seat], timeout_s: float) -> str:
    """The first one has waited for all, and these have come."""
    present = {seat.rank for seat in seats}
    missing = [number for number in range(info.world_size) if number not in present]
    return (
        f"{len(seats)} of {info.world_size} {info.noun}s came within {timeout_s:g} s; missing: "
        f"{named(info.noun, missing, info.expected_hosts)}; present: {seat_table(seats, info.noun)}"
    )


def named(noun: str, numbers: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks, or agents, each with its host where the scheduler tells."""
    return first_few([f"{noun} {number}" + (f" on {hosts[number]}" if hosts else "") for number in numbers], 16)
