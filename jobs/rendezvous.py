"""RankInfo -> initialised process group: the ranks of one job find each other, and nobody else's.

Rank 0 binds a store on a port that the kernel picks, and announces it in the attempt's own folder of the run
directory by an atomic rename; so no port is hoped for, and no rank can read another job's announcement. Every rank
reports where it sits; rank 0 numbers them host by host and answers all with one table, or with one error.
Every wait ends at the job's rendezvous deadline and says who is missing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.errors import RendezvousError, TopologyError
from jobs.records import read_json, write_json
from jobs.topology import Placement, RankInfo, Seat, number_by_host, place, seat_table

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@dataclass
class Rendezvous:
    """A rank's seat among the others, and the store that they share."""

    placement: Placement
    store: dist.Store
    """Prefixed with the job's identity."""

    def finish(self, timeout_s: float) -> None:
        """Holds rank 0, whose process is the store, until every rank has come here.

        Raises:
            RendezvousError: on rank 0, the others took longer than `timeout_s`.
        """
        me, world = self.placement.rank, self.placement.world_size
        self.store.set(f"finished/{me}", "1")
        if me == 0:
            deadline = time.monotonic() + timeout_s
            waiting = set(range(world))
            while waiting:
                waiting = {rank for rank in waiting if not self.store.check([f"finished/{rank}"])}
                if waiting and time.monotonic() > deadline:
                    raise RendezvousError(
                        f"rank 0 is done, and after {timeout_s:g} s these are not: "
                        + _named(sorted(waiting), self.placement.hosts)
                    )
                if waiting:
                    time.sleep(0.01)


def join(info: RankInfo, device: str, announcement: Path, timeout_s: float, interface: str | None) -> Rendezvous:
    """Meets the job's other ranks.

    Args:
        info: who this rank is, as its launcher says.
        device: "cpu" or "cuda"; all ranks must have the same.
        announcement: the file in which rank 0 says where its store is; in a directory that all ranks see and that
            belongs to this job and attempt alone.
        timeout_s: seconds until everyone must be there.
        interface: network interface whose address rank 0 announces; None = loopback for emulated hosts, else the
            one that leads to the other hosts.

    Raises:
        RendezvousError: ranks are missing at the deadline (named, with their hosts where known).
        TopologyError: hosts hold unequal numbers of ranks, or some have GPUs and others not.
    """
    deadline = time.monotonic() + timeout_s
    identity = f"{info.job_id}-{info.attempt}"
    raw = _open_store(info, identity, announcement, deadline, timeout_s, interface)
    store = dist.PrefixStore(f"meshrun/{identity}", raw)
    seat = Seat(info.rank, info.host, info.local_rank, os.getpid(), device)
    try:
        store.set(f"seat/{info.rank}", json.dumps(seat.to_json()))
        if info.rank == 0:
            answer = _seat_everyone(info, store, deadline, timeout_s)
            store.set("table", json.dumps(answer))
            if "error" in answer:
                _linger(store, answer["present"])
        else:
            # rank 0 answers at the deadline at the latest; the grace is for its answer to arrive.
            store.wait(["table"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + 15))
            answer = json.loads(store.get("table"))
            store.add("read", 1)
    except dist.DistStoreError as error:
        raise RendezvousError(
            f"rank 0{_on_host(info)} has not answered {timeout_s + 15:g} s after the start"
        ) from error
    except dist.DistNetworkError as error:
        raise RendezvousError(f"rank 0{_on_host(info)} went away during rendezvous") from error
    if "error" in answer:
        kind = TopologyError if answer["kind"] == "topology" else RendezvousError
        raise kind(answer["error"])
    seats = [Seat(**seat) for seat in answer["seats"]]
    return Rendezvous(place(seats, info.rank), store)


def _open_store(
    info: RankInfo, identity: str, announcement: Path, deadline: float, timeout_s: float, interface: str | None
) -> dist.Store:
    if info.master_addr is not None and info.master_port is not None:
        # torchrun: its agent, or rank 0 beside it, holds the store.
        agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            return dist.TCPStore(
                info.master_addr,
                info.master_port,
                info.world_size,
                is_master=info.rank == 0 and not agent_store,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise RendezvousError(
                f"no store at {info.master_addr}:{info.master_port} within {timeout_s:g} s"
            ) from error
    if info.rank == 0:
        address = own_address(info, interface)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(4096)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        write_json(announcement, {"address": address, "port": port, "identity": identity, "host": info.host})
        return store
    said = _read_announcement(info, identity, announcement, deadline, timeout_s)
    try:
        return dist.TCPStore(
            said["address"],
            said["port"],
            is_master=False,
            timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            wait_for_workers=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise RendezvousError(
            f"rank 0 announced {said['address']}:{said['port']} on {said['host']}, "
            f"and it cannot be reached from here within {timeout_s:g} s"
        ) from error


def _read_announcement(
    info: RankInfo, identity: str, announcement: Path, deadline: float, timeout_s: float
) -> dict[str, Any]:
    pause = 0.01
    while True:
        said = read_json(announcement)
        if said is not None and said["identity"] == identity:
            return said
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"missing: rank 0{_on_host(info)}, which has not announced itself within {timeout_s:g} s "
                f"(in {announcement}); is it still starting, and does it see the same file system?"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
        # Opening the directory makes an NFS client look again instead of answering from its cache.
        os.close(os.open(announcement.parent, os.O_RDONLY))


def _on_host(info: RankInfo) -> str:
    """` on HOST` of rank 0, where the scheduler tells."""
    return f" on {info.expected_hosts[0]}" if info.expected_hosts else ""


def _seat_everyone(info: RankInfo, store: dist.Store, deadline: float, timeout_s: float) -> dict[str, Any]:
    """On rank 0: waits for every seat and numbers them; the answer that all ranks get."""
    missing = list(range(info.world_size))
    while missing:
        missing = [rank for rank in missing if not store.check([f"seat/{rank}"])]
        if missing and time.monotonic() > deadline:
            break
        if missing:
            time.sleep(0.01)
    present = [rank for rank in range(info.world_size) if rank not in set(missing)]
    seats = [Seat(**json.loads(store.get(f"seat/{rank}"))) for rank in present]
    if missing:
        return {
            "kind": "rendezvous",
            "present": len(present),
            "error": f"{len(present)} of {info.world_size} ranks came within {timeout_s:g} s; missing: "
            f"{_named(missing, info.expected_hosts)}; present: {seat_table(seats)}",
        }
    try:
        return {"seats": [seat.to_json() for seat in number_by_host(seats)]}
    except TopologyError as error:
        return {"kind": "topology", "present": len(present), "error": str(error)}


def _linger(store: dist.Store, present: int, at_most_s: float = 3.0) -> None:
    """Keeps the store until the others have read the error, so that they say the same and not that rank 0 is gone."""
    deadline = time.monotonic() + at_most_s
    while store.add("read", 0) < present - 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def _named(ranks: list[int], hosts: tuple[str, ...]) -> str:
    named = [f"rank {rank}" + (f" on {hosts[rank]}" if hosts else "") for rank in ranks[:16]]
    return ", ".join(named) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def init_process_group(meeting: Rendezvous, device: torch.device, backend: str, timeout_s: float) -> None:
    """The default process group, over the store that the ranks met at."""
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("pg", meeting.store),
        rank=meeting.placement.rank,
        world_size=meeting.placement.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


# --- addresses --------------------------------------------------------------------------------------------------------


def own_address(info: RankInfo, interface: str | None) -> str:
    """The IPv4 address that the other ranks reach this host by.

    Raises:
        TopologyError: the configured interface is not there or has no address.
    """
    if interface is not None:
        address = interface_address(interface)
        if address is None:
            have = ", ".join(name for _, name in socket.if_nameindex())
            raise TopologyError(f"interface '{interface}' has no IPv4 address on {info.host} (it has: {have})")
        return address
    if info.launcher == "local":
        return LOOPBACK
    return _first_address() or LOOPBACK


def gloo_interface(info: RankInfo, interface: str | None) -> str | None:
    """The interface to give gloo, which would otherwise resolve the host's name, often to a loopback address."""
    if interface is not None:
        return interface
    if info.launcher == "local" and sys.platform == "darwin":
        return "lo0"
    wanted = LOOPBACK if info.launcher == "local" else _first_address() or LOOPBACK
    for _, name in socket.if_nameindex():
        if interface_address(name) == wanted:
            return name
    return None


def _first_address() -> str | None:
    """The first interface's address that is not a loopback one."""
    for _, name in socket.if_nameindex():
        address = interface_address(name)
        if address is not None and not address.startswith("127."):
            return address
    return None


def interface_address(name: str) -> str | None:
    """The IPv4 address of a network interface (netdevice(7)); None where it has none."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            siocgifaddr = 0x8915
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), siocgifaddr, request)[20:24])
    except (OSError, ImportError):
        return None
