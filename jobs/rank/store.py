"""The TCPStore that the ranks of one job share: opened, announced, found, and known to be the job's own.

Rank 0 listens on its own address, on a free port (of the configured range, or of the kernel's choice), writes into its
store whose it is, and announces it by an atomic rename in the attempt's own folder of the run directory: the rendezvous
file. So no port is hoped for, no rank reads another job's file, and a rank that finds another store at the port, since
the job's own is gone, sees that. Where a launcher's store waits already (torchrun's, or our agents'), it is used.
"""

from __future__ import annotations

import _thread
import functools
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from jobs.errors import RendezvousError, UnreachableError
from jobs.processes import look_again_in_s
from jobs.rank.identity import RankInfo
from jobs.rank.network import listen, own_address
from jobs.rank.rendezvous_file import (
    announced,
    failing_for_all,
    first_is_missing,
    read_rendezvous_file,
    unreachable,
)
from jobs.run_dir import write_json

log = logging.getLogger(__name__)

T = TypeVar("T")

OWNER = "meshrun/owner"
"""The store's key that says whose it is: identity and nonce. Without the job's prefix, so that others find it too."""

_NONE = "none"


class Beside(Generic[T]):
    """A call in a thread of its own, which may be left behind.

    Where a server accepts and never answers, torch's client waits for ever whatever its time-out is: while it connects,
    in check(), and in wait() and get(), which wait for the server to take note that they gave up (2.13).
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._ended = _thread.allocate_lock()
        self._ended.acquire()

        def run() -> None:
            try:
                self._result = call()
            except BaseException as error:
                self._error: BaseException | None = error
            else:
                self._error = None
            self._ended.release()

        # Not by threading, which waits until the thread has begun: thousands of ranks on few cores wait long for that.
        _thread.start_new_thread(run, ())

    def has_ended(self, within_s: float) -> bool:
        """Waits for the call's end, but no longer than that."""
        if not self._ended.acquire(timeout=max(0.0, within_s)):
            return False
        self._ended.release()
        return True

    def result(self) -> T:
        """What the ended call returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result


def launchers_store(info: RankInfo, env: Mapping[str, str], timeout_s: float) -> dist.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT, which an agent (ours, or torchrun's) holds, or else rank 0 itself.

    Raises:
        RendezvousError: nothing answers there.
    """
    assert info.master_addr is not None
    assert info.master_port is not None
    try:
        return dist.TCPStore(
            info.master_addr,
            info.master_port,
            is_master=info.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise RendezvousError(f"no TCPStore at {info.master_addr}:{info.master_port} within {timeout_s:g} s") from error


# --- rank 0: a store, bound before it is announced --------------------------------------------------------------------


def open_store(
    info: RankInfo, rendezvous_file: Path, timeout_s: float, interface: str | None, ports: tuple[int, int] | None
) -> tuple[dist.Store, str]:
    """Opens the store, puts the job's name on it and announces it; what prevents that is announced in its place.

    Returns:
        The store and its address.
    """
    with failing_for_all(info, rendezvous_file):
        address = own_address(info, interface, info.network_peer)
        listener = listen(info, address, ports)
        port = listener.getsockname()[1]
        store = serve(info, listener, timeout_s)
    nonce = secrets.token_hex(8)
    store.set(OWNER, f"{info.identity} {nonce}")
    write_json(
        rendezvous_file,
        {"address": address, "port": port, "identity": info.identity, "nonce": nonce, "host": info.host},
    )
    return store, address


def serve(info: RankInfo, listener: socket.socket, timeout_s: float) -> dist.TCPStore:
    """A store behind a socket that listens.

    Raises:
        RendezvousError: this host does not reach its own socket.
    """
    address, port = listener.getsockname()
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
            f"{info.noun} 0 on {info.host} listens on {address}:{port}, but cannot reach it itself; "
            "is the loopback interface down, or does a firewall forbid it?"
        ) from error
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def is_superseded(store: dist.Store, rendezvous_file: Path) -> bool:
    """On rank 0: whether another process has announced itself as rank 0 of the same job since."""
    latest = read_rendezvous_file(rendezvous_file)
    if latest is None or not store.check([OWNER]):
        return False
    identity, nonce = store.get(OWNER).decode().split()
    return bool(latest["identity"] == identity and latest.get("nonce", nonce) != nonce)


# --- the others: the store that was announced, if it is the job's own -------------------------------------------------


def find_store(info: RankInfo, rendezvous_file: Path, deadline: float, timeout_s: float) -> tuple[dist.Store, str]:
    """The store that rank 0 announced.

    No other store that is found there is a reason to give up before the deadline: rank 0 may announce itself anew.

    Returns:
        The store and its address.

    Raises:
        RendezvousError: rank 0 has not announced itself, or what listens there does not answer, or only with nonsense.
        UnreachableError: nothing listens there, or another job's store.
    """
    where: dict[str, Any] | None = None
    connecting: Beside[dist.Store] | None = None
    others, problem, kind = "", "", RendezvousError
    retry_pause, retry_at, began = 0.0, 0.0, time.monotonic()
    while True:
        latest = read_rendezvous_file(rendezvous_file)
        if latest is not None and latest["identity"] != info.identity:
            others, latest = latest["identity"], None
        if latest is not None and latest != where:
            if "error" in latest:
                raise RendezvousError(latest["error"])
            where, connecting, problem, kind, retry_pause, retry_at = latest, None, "", RendezvousError, 0.25, 0.0
        now = time.monotonic()
        # While this rank is connecting, a newer announcement is hardly to be expected.
        pause = max(look_again_in_s(now - began), 0.0 if connecting is None else 1.0)
        if now >= deadline:
            break
        if where is not None and connecting is None and now >= retry_at:
            connecting = Beside(functools.partial(connect, where, deadline - now, info.local_rank == 0))
        if where is None or connecting is None:
            time.sleep(min(pause, deadline - now))
        elif connecting.has_ended(min(pause, deadline - now)):
            try:
                store = connecting.result()
                store.set_timeout(timedelta(seconds=timeout_s))
                return store, where["address"]
            except (OSError, RendezvousError, dist.DistError) as error:
                known, problem = problem, _problem(info, error)
                # Where the connection is accepted but not answered, it may be rank 0 that hangs: not this rank's fault.
                kind = RendezvousError if isinstance(error, dist.DistError) else UnreachableError
            if problem != known:
                log.warning("%s; trying again until the deadline", announced(info, where, problem))
            # Ever less often: with each refusal torch's client writes a page into the log.
            connecting, retry_at, retry_pause = None, time.monotonic() + retry_pause, min(retry_pause * 2, 5.0)
    if where is None:
        raise RendezvousError(first_is_missing(info, rendezvous_file, others, timeout_s))
    problem = problem or "but what listens there does not answer"
    raise kind(f"{announced(info, where, problem)}; tried for {timeout_s:g} s")


def connect(where: dict[str, Any], seconds: float, knocks: bool = True) -> dist.Store:
    """The announced store.

    Args:
        where: what the rendezvous file says.
        seconds: until the deadline.
        knocks: whether to see first that anything can be reached there. One rank per host is enough: thousands that
            all connect twice at once make more connections than a socket keeps waiting, and lose some.

    Raises:
        OSError: nothing is reached there.
        DistError: what answers there is not a TCPStore.
        RendezvousError: it is another's.
    """
    address, port = where["address"], where["port"]
    if knocks:
        _knock(address, port, seconds)
    # A busy store may answer late when hundreds ask at once. If it is not a store, there is time to try again.
    patience = timedelta(seconds=min(30.0, max(2.0, seconds / 4)))
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
    except dist.DistError:
        _knock(address, port, seconds)
        raise
    # Not get(), which would wait for a key that is not there: this changes nothing and answers at once.
    owner = store.compare_set(OWNER, _NONE, _NONE).decode()
    if owner != f"{where['identity']} {where['nonce']}":
        theirs, mine = owner.partition(" ")[0], where["identity"]
        if theirs == _NONE:
            raise RendezvousError(f"but the TCPStore there is not meshrun's, and this is {mine}")
        whose = f"another start of {mine}" if theirs == mine else f"{theirs}, not to {mine}"
        raise RendezvousError(f"but the store there belongs to {whose}")
    return store


def _knock(address: str, port: int, seconds: float) -> None:
    """Connects without torch, whose client says why it was refused in its own log alone, and overstays its time-out.

    Raises:
        OSError: nothing is reached there.
    """
    socket.create_connection((address, port), timeout=min(seconds, 10)).close()


def _problem(info: RankInfo, error: OSError | RendezvousError | dist.DistError) -> str:
    if isinstance(error, RendezvousError):
        return str(error)
    if not isinstance(error, OSError):
        return "but what answers there is not a TCPStore"
    return unreachable(info, error)
