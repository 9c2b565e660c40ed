"""RankInfo -> initialised process group: the ranks of one job find each other, and nobody else's.

Rank 0 listens on its own address, on a port that is free (of the configured range, or of the kernel's choice), writes
into its store whose it is, and announces it in the attempt's own folder of the run directory by an atomic rename. So
no port is hoped for, no rank reads another job's announcement, and one whose announced port has meanwhile gone to
somebody else sees that the store there is not its own. Every rank reports where it sits; rank 0 numbers them host by
host and answers all with one table, or with one error. Every wait ends at the job's rendezvous deadline and says who
is missing.
"""

from __future__ import annotations

import _thread
import base64
import errno
import functools
import itertools
import json
import logging
import os
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jobs.errors import MeshrunError, RendezvousError, TopologyError, UnreachableError
from jobs.processes import look_again_in_s
from jobs.rank.identity import RankInfo
from jobs.rank.network import own_address
from jobs.rank.numbering import Placement, Seat, number_by_host, place, seat_table
from jobs.run_dir import read_json, write_json
from workloads.errors import first_few, spoken_for

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_S = 15.0
"""Rank 0 answers at the deadline at the latest; for so much longer its answer may take to arrive."""
OWNER = "meshrun/owner"
"""The store's key that says whose it is: identity and nonce. Without the job's prefix, so that others find it too."""

_DOUBLED = "doubled"
_NONE = "none"


@dataclass
class Rendezvous:
    """A rank's seat among the others, and the store that they share."""

    placement: Placement
    store: dist.Store
    """Prefixed with the job's identity."""
    address: str
    """This host's own, on the network of rank 0's store."""
    ahead_s: float = 0.0
    """Seconds by which this host's clock is ahead of rank 0's, to within the time that rank 0's answer took."""
    noun: str = "rank"
    """What those who met are called."""

    def finish(self, timeout_s: float) -> None:
        """Holds rank 0, whose process is the store, until every rank has come here.

        Raises:
            RendezvousError: on rank 0, the others took longer than `timeout_s`.
        """
        me, world = self.placement.rank, self.placement.world_size
        self.store.append("finished", f"{me} ")  # type: ignore[attr-defined]  # the stubs leave it out
        deadline = time.monotonic() + timeout_s
        while me == 0 and len(finished := set(map(int, self.store.get("finished").split()))) < world:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"{self.noun} 0 is done, and after {timeout_s:g} s these are not: "
                    + _named([rank for rank in range(world) if rank not in finished], self.placement.hosts, self.noun)
                )
            time.sleep(0.01)


def join(
    info: RankInfo,
    device: str,
    announcement: Path,
    timeout_s: float,
    interface: str | None,
    ports: tuple[int, int] | None = None,
    gpu: str = "",
) -> Rendezvous:
    """Meets the job's other ranks, or where `info.noun` says so its other agents.

    Agents and ranks of one job may meet in one store: neither sees the other's keys.

    Args:
        info: who this rank is, as its launcher says.
        device: "cpu" or "cuda"; all ranks must have the same.
        announcement: the file in which rank 0 says where its store is; in a directory that all ranks see and that
            belongs to this job and attempt alone.
        timeout_s: seconds until everyone must be there.
        interface: network interface whose address rank 0 announces; None = loopback for emulated hosts, else the
            one that leads to the other hosts.
        ports: first and last port that rank 0 may listen on; None = whichever is free.
        gpu: what tells this rank's GPU from every other; "" for none, or where that is not known.

    Raises:
        RendezvousError: ranks are missing at the deadline (named, with their hosts where known), no port is free, or
            what listens where rank 0 announced itself is not its store.
        TopologyError: hosts hold unequal numbers of ranks, some have GPUs and others not, or two ranks of a host
            have the same one; or this host's network interface is not there, is down or has no address.
    """
    deadline = time.monotonic() + timeout_s
    if info.master_addr is not None and info.master_port is not None:
        address = own_address(info, interface, info.master_addr)
        raw: dist.Store = _launchers_store(info, info.master_addr, info.master_port, timeout_s)
    elif info.rank == 0:
        raw, address = _serve(info, announcement, timeout_s, interface, ports)
    else:
        if interface is not None:
            own_address(info, interface, None)  # before meeting, so that the host with the broken one is named
        raw, address_of_rank_0 = _find_store(info, announcement, deadline, timeout_s)
        address = own_address(info, interface, address_of_rank_0)
    store = dist.PrefixStore(f"meshrun/{info.noun}/{info.identity}", raw)
    seat = Seat(info.rank, info.host, info.local_rank, device, gpu)
    try:
        if info.rank == 0:
            _claim_seat(info, store, seat)
            answer = _seat_everyone(info, store, deadline, timeout_s, lambda: _is_superseded(raw, announcement))
            store.set("table", _packed({**answer, "now": time.time()}))
            if "error" in answer:
                _linger(store, answer["present"])
        else:
            seconds = max(1.0, deadline - time.monotonic()) + GRACE_S
            answer = _beside(lambda: _take_seat(info, store, seat, seconds)).result(seconds + 2)
    except (dist.DistStoreError, futures.TimeoutError) as error:
        raise RendezvousError(f"{_first(info)} has not answered {timeout_s + GRACE_S:g} s after the start") from error
    except dist.DistNetworkError as error:
        raise RendezvousError(f"{_first(info)} went away during rendezvous") from error
    if "error" in answer:
        kind = TopologyError if answer["kind"] == "topology" else RendezvousError
        # Who meets in vain stays a victim until it ends; hosts that cannot make a mesh are a failure like any other.
        raise spoken_for(kind(answer["error"]), 0, info.rank) if kind is TopologyError else kind(answer["error"])
    placement = place(answer["hosts"].split(), _order(answer), info.rank)
    return Rendezvous(placement, store, address, answer.get("ahead_s", 0.0), info.noun)


def _launchers_store(info: RankInfo, address: str, port: int, timeout_s: float) -> dist.Store:
    """torchrun's: its agent, or rank 0 beside it, holds the store."""
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            address,
            port,
            info.world_size,
            is_master=info.rank == 0 and not agent_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise RendezvousError(f"no store at {address}:{port} within {timeout_s:g} s") from error


def _beside(call: Callable[[], T]) -> futures.Future[T]:
    """Calls in a thread of its own, which may be left behind.

    Where somebody listens and never answers, torch's client waits for ever whatever its time-out is: while it
    connects, in check(), and in wait() and get(), which wait for the server to take note that they gave up (2.13).
    """
    future: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Not by threading, which waits until the thread has begun: thousands of ranks on few cores wait long for that.
    _thread.start_new_thread(run, ())
    return future


# --- rank 0: a store, bound before it is announced --------------------------------------------------------------------


def _serve(
    info: RankInfo, announcement: Path, timeout_s: float, interface: str | None, ports: tuple[int, int] | None
) -> tuple[dist.Store, str]:
    """Opens the store, puts the job's name on it and announces it; what prevents that is announced in its place.

    Returns:
        The store and its address.
    """
    try:
        address = own_address(info, interface, info.network_peer)
        listener = listen(info, address, ports)
        port = listener.getsockname()[1]
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=True,
                timeout=timedelta(seconds=min(timeout_s, 10)),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        except dist.DistError as error:
            raise RendezvousError(
                f"{info.noun} 0 listens on {address}:{port} and cannot reach it from {info.host} itself; "
                "is its loopback interface down, or does a firewall forbid it?"
            ) from error
    except MeshrunError as error:
        write_json(announcement, {"identity": info.identity, "host": info.host, "error": str(error)})
        raise
    store.set_timeout(timedelta(seconds=timeout_s))
    nonce = secrets.token_hex(8)
    store.set(OWNER, f"{info.identity} {nonce}")
    said = {"address": address, "port": port, "identity": info.identity, "nonce": nonce, "host": info.host}
    write_json(announcement, said)
    return store, address


def listen(info: RankInfo, address: str, ports: tuple[int, int] | None) -> socket.socket:
    """A socket that listens on `address`: on a port of the range, or without one on a port of the kernel's choice.

    The range is walked from a place that depends on the job, so that jobs which start together do not all try the
    same ports.

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
        f"{info.noun} 0 on {info.host} finds every port of rendezvous_ports {first}-{last} taken on {address}; "
        "widen the range in the cluster config, or leave it out where no firewall asks for one"
    )


# --- the others: the store that was announced, if it is the job's own -------------------------------------------------


def _find_store(info: RankInfo, announcement: Path, deadline: float, timeout_s: float) -> tuple[dist.Store, str]:
    """The store that rank 0 announced.

    Whatever else is met there is no reason to give up before the deadline: rank 0 may announce itself anew.

    Returns:
        The store and its address.
    """
    said: dict[str, Any] | None = None
    asking: futures.Future[dist.Store] | None = None
    others, problem, kind = "", "", RendezvousError
    retry_pause, ask_at, began = 0.0, 0.0, time.monotonic()
    while True:
        latest = _read(announcement)
        if latest is not None and latest["identity"] != info.identity:
            others, latest = f", where the announcement is that of {latest['identity']}", None
        if latest is not None and latest != said:
            if "error" in latest:
                raise RendezvousError(latest["error"])
            said, asking, problem, kind, retry_pause, ask_at = latest, None, "", RendezvousError, 0.25, 0.0
        now = time.monotonic()
        # While a store is asked, a newer announcement is hardly to be expected.
        pause = max(look_again_in_s(now - began), 0.0 if asking is None else 1.0)
        if now >= deadline:
            break
        if said is not None and asking is None and now >= ask_at:
            asking = _beside(functools.partial(_connect, said, deadline - now, info.local_rank == 0))
        if said is None or asking is None:
            time.sleep(min(pause, deadline - now))
        elif futures.wait([asking], min(pause, deadline - now)).done:
            try:
                store = asking.result()
                store.set_timeout(timedelta(seconds=timeout_s))
                return store, said["address"]
            except (OSError, RendezvousError, dist.DistError) as error:
                known, problem = problem, _problem(error, info.noun)
                # Where something answers to the connection alone, it may be rank 0 that hangs: that is not this rank's.
                kind = RendezvousError if isinstance(error, dist.DistError) else UnreachableError
            if problem != known:
                log.warning("%s; asking again until the deadline", _announced(said, problem, info.noun))
            # Ever less often: with each refusal torch's client writes a page into the log.
            asking, ask_at, retry_pause = None, time.monotonic() + retry_pause, min(retry_pause * 2, 5.0)
    if said is None:
        raise RendezvousError(
            f"missing: {_first(info)}, which has not announced itself within {timeout_s:g} s "
            f"(in {announcement}{others}); is it still starting, and does it see the same file system?"
        )
    problem = problem or "where something listens that does not answer"
    raise kind(f"{_announced(said, problem, info.noun)}; asked for {timeout_s:g} s")


def _read(announcement: Path) -> dict[str, Any] | None:
    try:
        # Opening the directory makes an NFS client look again instead of answering from its cache.
        os.close(os.open(announcement.parent, os.O_RDONLY))
        return read_json(announcement)
    except OSError:  # ESTALE: another file has taken its name since it was opened
        return None


def _connect(said: dict[str, Any], seconds: float, knocks: bool = True) -> dist.Store:
    """The announced store.

    Args:
        said: the announcement.
        seconds: until the deadline.
        knocks: whether to see first that anything can be reached there. One rank per host is enough: thousands that
            all connect twice at once make more connections than a socket keeps waiting, and lose some.

    Raises:
        OSError: nobody is reached there.
        DistError: who is there is no store.
        RendezvousError: it is another's.
    """
    address, port = said["address"], said["port"]
    if knocks:
        _knock(address, port, seconds)
    # A busy store may answer late when hundreds ask at once. What is none leaves time to be met again, and said.
    patience = timedelta(seconds=min(30.0, max(2.0, seconds / 4)))
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
    except dist.DistError:
        _knock(address, port, seconds)
        raise
    # Not get(), which would wait for a key that is not there: this changes nothing and answers at once.
    owner = store.compare_set(OWNER, _NONE, _NONE).decode()
    if owner != f"{said['identity']} {said['nonce']}":
        theirs, mine = owner.partition(" ")[0], said["identity"]
        if theirs == _NONE:
            whose = f"not one of meshrun's, and this is {mine}"
        elif theirs == mine:
            whose = f"that of another start of {mine}"
        else:
            whose = f"that of {theirs}, not that of {mine}"
        raise RendezvousError(f"and the store there is {whose}")
    return store


def _knock(address: str, port: int, seconds: float) -> None:
    """Connects without torch, whose client says why it was refused in its own log alone, and overstays its time-out.

    Raises:
        OSError: nobody is reached there.
    """
    socket.create_connection((address, port), timeout=min(seconds, 10)).close()


def _problem(error: Exception, noun: str) -> str:
    if isinstance(error, RendezvousError):
        return str(error)
    if isinstance(error, dist.DistError):
        return "where something listens that is no store"
    words = getattr(error, "strerror", None) or str(error)
    return (
        f"and it cannot be reached from here ({words}): {noun} 0 is gone, or a firewall lies between "
        "(interface and rendezvous_ports of the cluster config choose another way)"
    )


def _announced(said: dict[str, Any], problem: str, noun: str) -> str:
    return f"{noun} 0 announced {said['address']}:{said['port']} on {said['host']}, {problem}"


def _take_seat(info: RankInfo, store: dist.Store, seat: Seat, seconds: float) -> dict[str, Any]:
    """Reports the seat; rank 0's answer."""
    _claim_seat(info, store, seat)
    store.wait(["table"], timedelta(seconds=seconds))
    heard = time.time()
    answer = _unpacked(store.get("table"))
    answer["ahead_s"] = heard - answer["now"]
    if "error" in answer:
        store.add("read", 1)
    return answer


def _claim_seat(info: RankInfo, store: dist.Store, seat: Seat) -> None:
    """Reports the seat.

    Raises:
        RendezvousError: another process is this rank already; it, and rank 0, come to know.
    """
    if store.add(f"claims/{seat.rank}", 1) == 1:
        store.append("seats", seat.to_line())  # type: ignore[attr-defined]
        return
    first = next((f" on {other.host}" for other in _reported(store) if other.rank == seat.rank), "")
    which = f"{info.noun} {seat.rank}, the first{first}, the second on {seat.host}"
    problem = f"two processes are {which}; {_one_each(info.noun)}"
    store.set(_DOUBLED, problem)
    raise RendezvousError(problem)


def _is_superseded(store: dist.Store, announcement: Path) -> bool:
    """On rank 0: whether another process has announced itself as rank 0 of the same job since."""
    said = _read(announcement)
    if said is None or not store.check([OWNER]):
        return False
    identity, nonce = store.get(OWNER).decode().split()
    return said["identity"] == identity and said.get("nonce", nonce) != nonce


def _first(info: RankInfo) -> str:
    """Rank 0, with its host where the scheduler tells."""
    return f"{info.noun} 0" + (f" on {info.expected_hosts[0]}" if info.expected_hosts else "")


def _one_each(noun: str) -> str:
    return f"start every {noun} once, with submit.py, srun or torchrun, and without mpirun"


def _seat_everyone(
    info: RankInfo, store: dist.Store, deadline: float, timeout_s: float, is_superseded: Callable[[], bool]
) -> dict[str, Any]:
    """On rank 0: waits for every seat and numbers them; the answer that all ranks get."""
    doubled, look_at = "", time.monotonic() + 1
    # One key that all append to: thousands of keys, each asked for until it is there, kept the store from answering.
    while store.get("seats").count(b"\n") < info.world_size and not doubled and time.monotonic() < deadline:
        time.sleep(0.01)
        if store.check([_DOUBLED]):
            doubled = store.get(_DOUBLED).decode()
        elif time.monotonic() > look_at:
            look_at = time.monotonic() + 1
            if is_superseded():
                doubled = f"two processes are {info.noun} 0, one on {info.host}; {_one_each(info.noun)}"
    seats = _reported(store)
    if doubled:
        return {"kind": "rendezvous", "present": len(seats), "error": doubled}
    if len(seats) < info.world_size:
        present = {seat.rank for seat in seats}
        missing = [rank for rank in range(info.world_size) if rank not in present]
        return {
            "kind": "rendezvous",
            "present": len(seats),
            "error": f"{len(seats)} of {info.world_size} {info.noun}s came within {timeout_s:g} s; missing: "
            f"{_named(missing, info.expected_hosts, info.noun)}; present: {seat_table(seats, info.noun)}",
        }
    try:
        return _table(number_by_host(seats, info.noun))
    except TopologyError as error:
        return {"kind": "topology", "present": len(seats), "error": str(error)}


def _reported(store: dist.Store) -> list[Seat]:
    """The seats that were reported until now."""
    return [Seat.from_line(line) for line in store.get("seats").decode().splitlines()]


def _table(seats: list[Seat]) -> dict[str, Any]:
    """Seats in host-major order as an answer: every rank reads it from the one store, so no more than they need."""
    ranks = [seat.rank for seat in seats]
    answer: dict[str, Any] = {
        "hosts": " ".join(dict.fromkeys(seat.host for seat in seats)),  # as one text: no name has a space
        "world_size": len(seats),
    }
    if ranks != list(range(len(seats))):
        # As steps, which under any usual distribution repeat, so that packing leaves nearly nothing of them.
        answer["steps"] = [rank - before for before, rank in itertools.pairwise([0, *ranks])]
    return answer


def _order(answer: dict[str, Any]) -> Sequence[int]:
    """The scheduler's numbers in host-major order."""
    return list(itertools.accumulate(answer["steps"])) if "steps" in answer else range(answer["world_size"])


def _packed(answer: dict[str, Any]) -> str:
    return base64.b64encode(zlib.compress(json.dumps(answer).encode())).decode()


def _unpacked(text: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text)))
    return answer


def _linger(store: dist.Store, present: int, at_most_s: float = 3.0) -> None:
    """Keeps the store until the others have read the error, so that they say the same and not that rank 0 is gone."""
    deadline = time.monotonic() + at_most_s
    while store.add("read", 0) < present - 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def _named(ranks: list[int], hosts: tuple[str, ...], noun: str) -> str:
    return first_few([f"{noun} {rank}" + (f" on {hosts[rank]}" if hosts else "") for rank in ranks], 16)


def init_process_group(
    meeting: Rendezvous, device: torch.device, backend: str, timeout_s: float
) -> dist.ProcessGroup | None:
    """The default process group, over the store that the ranks met at.

    Returns:
        A group of all ranks for tensors on the CPU and for objects; None: the default group is one.
    """
    # gloo would else connect every rank with every other at once; so it connects those that talk, when they first do. A
    # peer that dies before that is not missed until the group's time-out: the agent ends the others long before.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("pg", meeting.store),
        rank=meeting.placement.rank,
        world_size=meeting.placement.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return cpu_group(timeout_s) if backend == "nccl" else None


def cpu_group(timeout_s: float) -> dist.ProcessGroup:
    """A gloo group beside NCCL's default one: not a second backend of that, which every group of the mesh would get."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="cpu")
