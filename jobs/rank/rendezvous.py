"""RankInfo -> initialised process group: the ranks of one job meet in its store and get their numbers.

Every rank reports where it sits; rank 0 waits for all, numbers them host by host and answers all with one table, or
with one error. Ranks that an agent has started have their numbers already: they check in, and only rank 0, without
which no group comes about, waits for all and checks that they can make a mesh. Every wait ends at the job's rendezvous
deadline and says who is missing.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.errors import RendezvousError, TopologyError
from jobs.rank.identity import RankInfo
from jobs.rank.network import own_address
from jobs.rank.numbering import Placement, Seat, number_by_host, place
from jobs.rank.rendezvous_file import first_of, named, some_are_missing
from jobs.rank.store import Beside, find_store, is_superseded, launchers_store, open_store
from workloads.errors import spoken_for

GRACE_S = 15.0
"""For so much longer than its own deadline a rank waits for the answer of a rank 0 that has come."""

_DOUBLED = "doubled"
_ALL = "all have come"
_RANK_0 = "rank 0 has come"
_ONE_EACH = "start every rank once, with submit.py, srun or torchrun, and without mpirun"


@dataclass
class Rendezvous:
    """A rank's placement among the others, and the store that they share."""

    placement: Placement
    store: dist.Store
    """Prefixed with the job's identity."""
    address: str
    """This host's own, on the network of rank 0's store."""
    ahead_s: float = 0.0
    """Seconds by which this host's clock is ahead of rank 0's, to within the time that rank 0's answer took."""

    def finish(self, timeout_s: float) -> None:
        """Holds rank 0, whose process may hold the store, until every rank has come here.

        Raises:
            RendezvousError: on rank 0, the others took longer than `timeout_s`.
        """
        me, world = self.placement.rank, self.placement.world_size
        self.store.append("finished", f"{me} ")  # type: ignore[attr-defined]  # the stubs leave it out
        deadline = time.monotonic() + timeout_s
        while me == 0 and len(finished := set(map(int, self.store.get("finished").split()))) < world:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank 0 is done, but after {timeout_s:g} s these are not: "
                    + named("rank", [rank for rank in range(world) if rank not in finished], self.placement.hosts)
                )
            time.sleep(0.01)


def join(
    info: RankInfo,
    device: str,
    rendezvous_file: Path,
    timeout_s: float,
    interface: str | None,
    ports: tuple[int, int] | None = None,
    gpu: str = "",
) -> Rendezvous:
    """Meets the job's other ranks.

    Args:
        info: who this rank is, as its launcher says.
        device: "cpu" or "cuda"; all ranks must have the same.
        rendezvous_file: where rank 0 says where its store is; in a directory that all ranks see and that belongs to
            this job and attempt alone.
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
    raw: dist.Store | None = None
    holder = first_of(info)
    if info.master_addr is not None:
        address = own_address(info, interface, info.master_addr)
        holder = f"the store at {info.master_addr}:{info.master_port}"
    elif info.rank == 0:
        raw, address = open_store(info, rendezvous_file, timeout_s, interface, ports)
    else:
        if interface is not None:
            own_address(info, interface, None)  # before meeting, so that the host with the broken one is named
        raw, address_of_rank_0 = find_store(info, rendezvous_file, deadline, timeout_s)
        address = own_address(info, interface, address_of_rank_0)
    seat = Seat(info.rank, info.host, info.local_rank, device, gpu)

    def meet() -> tuple[dist.Store, dict[str, Any]]:
        opened = launchers_store(info, os.environ, timeout_s) if raw is None else raw
        store = dist.PrefixStore(f"meshrun/{info.identity}", opened)
        if info.rank:
            return store, _take_seat(info, store, seat, deadline, timeout_s)
        return store, _answer_everyone(
            info, store, seat, deadline, timeout_s, lambda: raw is not None and is_superseded(raw, rendezvous_file)
        )

    at_most_s = max(1.0, deadline - time.monotonic()) + GRACE_S
    meeting = Beside(meet)
    try:
        if not meeting.has_ended(at_most_s + 2):
            raise RendezvousError(f"{holder} has not answered within {timeout_s + GRACE_S:g} s")
        store, answer = meeting.result()
    except dist.DistNetworkError as error:
        raise RendezvousError(f"{holder} went away during rendezvous") from error
    if "error" in answer:
        kind = TopologyError if answer["kind"] == "topology" else RendezvousError
        # Who meets in vain stays a victim until it ends; hosts that cannot make a mesh are a failure like any other.
        raise spoken_for(kind(answer["error"]), 0, info.rank) if kind is TopologyError else kind(answer["error"])
    placement = place(answer["hosts"].split(), _order(answer), info.rank)
    return Rendezvous(placement, store, address, answer.get("ahead_s", 0.0))


def check_in(info: RankInfo, device: str, timeout_s: float, interface: str | None, gpu: str = "") -> Rendezvous:
    """`join` for a rank that an agent has started, and will end if another fails or this one waits in vain.

    Raises:
        RendezvousError: on rank 0, ranks are missing at the deadline; on the others, rank 0 is.
        TopologyError: on rank 0, the ranks cannot make a mesh.
    """
    assert info.node_rank is not None
    deadline = time.monotonic() + timeout_s
    address = own_address(info, interface, info.master_addr)
    opened = launchers_store(info, os.environ, timeout_s)
    store = dist.PrefixStore(f"meshrun/{info.identity}", opened)
    try:
        store.append("seats", Seat(info.rank, info.host, info.local_rank, device, gpu).to_line())  # type: ignore[attr-defined]
        if store.add("come", 1) == info.world_size:
            store.set(_ALL, "")
        if info.rank == 0:
            store.set(_RANK_0, "")
            number_by_host(_all_seats(info, store, deadline, timeout_s))
        else:
            store.wait([_RANK_0], timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        raise RendezvousError(f"missing: {first_of(info)}, which has not come within {timeout_s:g} s") from error
    except dist.DistNetworkError as error:
        raise RendezvousError(
            f"the store at {info.master_addr}:{info.master_port} went away during rendezvous"
        ) from error
    placement = Placement(
        rank=info.rank,
        world_size=info.world_size,
        local_rank=info.local_rank,
        local_world_size=info.local_world_size,
        node_rank=info.node_rank,
        nodes=info.world_size // info.local_world_size,
        hosts=info.expected_hosts,
    )
    return Rendezvous(placement, store, address)


def _all_seats(info: RankInfo, store: dist.Store, deadline: float, timeout_s: float) -> list[Seat]:
    """On rank 0: everyone's, once all have come.

    Raises:
        RendezvousError: ranks are missing at the deadline.
    """
    try:  # to ask for the seats again and again would keep the store from those who come
        store.wait([_ALL], timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        raise RendezvousError(some_are_missing(info, _reported(store), timeout_s)) from error
    return _reported(store)


def _take_seat(info: RankInfo, store: dist.Store, seat: Seat, deadline: float, timeout_s: float) -> dict[str, Any]:
    """Reports the seat; rank 0's answer.

    Raises:
        RendezvousError: rank 0 has not come by the deadline, or came and has not answered GRACE_S later.
    """
    _claim_seat(info, store, seat)
    try:
        store.wait(["table"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        if not store.check([_RANK_0]):
            raise RendezvousError(f"missing: {first_of(info)}, which has not come within {timeout_s:g} s") from error
        # It began later than this rank, and waits as long: it knows who else is missing.
        try:
            store.wait(["table"], timedelta(seconds=GRACE_S))
        except dist.DistStoreError as silence:
            raise RendezvousError(
                f"{first_of(info)} has come, but has not answered within {timeout_s + GRACE_S:g} s"
            ) from silence
    now = time.time()
    answer = _unpacked(store.get("table"))
    answer["ahead_s"] = now - answer["now"]
    if "error" in answer:
        store.add("read", 1)
    return answer


def _claim_seat(info: RankInfo, store: dist.Store, seat: Seat) -> None:
    """Reports the seat.

    Raises:
        RendezvousError: another process is this rank already; both, and rank 0, say so.
    """
    if store.add(f"claims/{seat.rank}", 1) == 1:
        store.append("seats", seat.to_line())  # type: ignore[attr-defined]
        return
    first = next((f" on {other.host}" for other in _reported(store) if other.rank == seat.rank), "")
    which = f"rank {seat.rank}, the first{first}, the second on {seat.host}"
    problem = f"two processes are {which}; {_ONE_EACH}"
    store.set(_DOUBLED, problem)
    raise RendezvousError(problem)


def _answer_everyone(
    info: RankInfo,
    store: dist.Store,
    seat: Seat,
    deadline: float,
    timeout_s: float,
    is_superseded: Callable[[], bool],
) -> dict[str, Any]:
    """On rank 0: the answer, which all ranks then have."""
    store.set(_RANK_0, "")
    _claim_seat(info, store, seat)
    answer = _seat_everyone(info, store, deadline, timeout_s, is_superseded)
    store.set("table", _packed({**answer, "now": time.time()}))
    if "error" in answer:
        _linger(store, answer["present"])
    return answer


def _seat_everyone(
    info: RankInfo, store: dist.Store, deadline: float, timeout_s: float, is_superseded: Callable[[], bool]
) -> dict[str, Any]:
    """On rank 0: waits for every seat and numbers them; the answer that all ranks get."""
    doubled, look_at, asked_s = "", time.monotonic() + 1, 0.0
    # One key that all append to: thousands of keys, each asked for until it is there, kept the store from answering.
    while not doubled and time.monotonic() < deadline:
        asked = time.monotonic()
        if store.get("seats").count(b"\n") >= info.world_size:
            break
        asked_s = time.monotonic() - asked
        time.sleep(min(1.0, max(0.01, 4 * asked_s)))  # a store that is busy with those who come is not kept from them
        if store.check([_DOUBLED]):
            doubled = store.get(_DOUBLED).decode()
        elif time.monotonic() > look_at:
            look_at = time.monotonic() + 1
            if is_superseded():
                doubled = f"two processes are rank 0, one on {info.host}; {_ONE_EACH}"
    seats = _reported(store)
    if doubled:
        return {"kind": "rendezvous", "present": len(seats), "error": doubled}
    if len(seats) < info.world_size:
        return {"kind": "rendezvous", "present": len(seats), "error": some_are_missing(info, seats, timeout_s)}
    try:
        numbered = number_by_host(seats)
    except TopologyError as error:
        return {"kind": "topology", "present": len(seats), "error": str(error)}
    return _table(numbered)


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
