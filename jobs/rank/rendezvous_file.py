"""The rendezvous file, in which the first of a job's ranks, or of its agents, says where it listens; without torch."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.errors import MeshrunError, RendezvousError
from jobs.rank.identity import RankInfo
from jobs.run_dir import read_json, write_json


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


def listen(info: RankInfo, address: str, ports: tuple[int, int] | None) -> socket.socket:
    """A socket that listens on `address`: on a port of the range, or without one on a port of the kernel's choice.

    The range is walked from a place that depends on the job, so that jobs that start together do not all try the same
    ports.

    Raises:
        RendezvousError: every port of the range is taken, or the system allows none.
    """
    first, last = ports or (0, 0)
    count = last - first + 1
    offset = zlib.crc32(info.identity.encode()) % count
    for port in (first + (offset + step) % count for step in range(count)):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if ports is not None:
            # An earlier store's connections in TIME_WAIT do not keep the port; one that still listens does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(4096)  # of two that could bind with SO_REUSEADDR, one can listen: only this makes it ours
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or ports is None:
                raise RendezvousError(
                    f"{info.noun} 0 on {info.host} cannot listen on {address}:{port}: {error.strerror}"
                    + (f"; rendezvous_ports of the cluster config is {first}-{last}" if ports else "")
                ) from error
    raise RendezvousError(
        f"{info.noun} 0 on {info.host} cannot listen: every port of rendezvous_ports {first}-{last} is taken on "
        f"{address}; widen the range in the cluster config, or leave it out where no firewall needs one"
    )


def read_rendezvous_file(rendezvous_file: Path) -> dict[str, Any] | None:
    """What it says; None while there is none."""
    try:
        # Opening the directory makes an NFS client look again instead of answering from its cache.
        os.close(os.open(rendezvous_file.parent, os.O_RDONLY))
        return read_json(rendezvous_file)
    except OSError:  # ESTALE: another file has taken its name since it was opened
        return None


def unreachable(error: OSError, noun: str) -> str:
    """Why whoever announced itself is not reached."""
    return (
        f"but it cannot be reached from here ({error.strerror or error}): {noun} 0 is gone, or a firewall is in "
        "between (set interface or rendezvous_ports in the cluster config)"
    )
