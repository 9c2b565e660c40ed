"""The agents of a job find each other: all connect to the leader, and learn from it who is on which host.

The leader listens before it says where, in the attempt's rendezvous file. Every other agent looks for that file,
connects and says who it is. When all have come, the leader tells each the hosts and where the ranks' store is. The
connections stay: agents and leader talk through them from then on.

Nothing here waits: `look` does what can be done at once, so that hosts meet while they import.

To the leader: `{"agent": NUMBER, "host": NAME, "nonce": NONCE}`. From it: `{"leader": IDENTITY, "left_s": SECONDS}` at
once, without `left_s` to one that is not of this job; then `{"hosts": [...], "address": ..., "port": ...}`, or
`{"error": TEXT}`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from jobs.agent.keeper import Keeper
from jobs.agent.link import Link, wait_for
from jobs.errors import RendezvousError, UnreachableError
from jobs.processes import look_again_in_s
from jobs.rank.identity import RankInfo
from jobs.rank.network import listen, own_address
from jobs.rank.numbering import Seat
from jobs.rank.rendezvous_file import (
    announced,
    failing_for_all,
    first_is_missing,
    first_of,
    read_rendezvous_file,
    some_are_missing,
    unreachable,
)
from jobs.run_dir import Attempt, write_json
from jobs.spec import JobSpec
from workloads.errors import first_few

log = logging.getLogger(__name__)

GRACE_S = 15.0
"""For so much longer than the leader's own deadline an agent waits for its answer."""
CONNECT_WITHIN_S = 10.0
LOOK_EVERY_S = 1.0
"""For whether there is a second leader, or for a newer one."""


@dataclass(frozen=True)
class Met:
    """What an agent knows once all hosts have met."""

    hosts: tuple[str, ...]
    """By the numbers of their agents; empty for a spare host's that has not come."""
    address: str
    port: int
    """Of the store."""
    links: dict[int, Link]
    """On the leader to every other agent, by the number of its host; elsewhere to the leader, under 0."""


class Gathering:
    """The meeting on the leader.

    Args:
        info: its place among the agents.
        spec: the job.
        attempt: where it says where it listens.
        log: its log, named in a failure.

    Raises:
        RendezvousError: no port is free.
        TopologyError: this host's network interface is not there, is down or has no address.
    """

    def __init__(self, info: RankInfo, spec: JobSpec, attempt: Attempt, log: str) -> None:
        self._info, self._file, self._timeout_s = info, attempt.rendezvous, spec.rendezvous_timeout_s
        self._listener: socket.socket | None = None
        self._newcomers: list[Link] = []
        self._links: dict[int, Link] = {}
        self._hosts = {info.rank: info.host}
        self._nonce = secrets.token_hex(16)
        self._deadline: float | None = None
        self._spares = spec.resources.spares
        self._problem = ""
        self._look_at = 0.0
        with failing_for_all(info, self._file):
            address = own_address(info, spec.interface, info.network_peer)
            self.keeper = Keeper(info, spec, attempt.number, listen(info, address, spec.rendezvous_ports), log)
            if info.world_size > 1:
                self._listener = listen(info, address, spec.rendezvous_ports)
                self._listener.setblocking(False)

    @property
    def private(self) -> tuple[int, ...]:
        """Descriptors that no rank may hold open."""
        return (*self.keeper.private, *([self._listener.fileno()] if self._listener else ()))

    def look(self) -> Met | None:
        """What came of it; None while it is not known.

        Raises:
            RendezvousError: agents are missing at the deadline (named, with their hosts where known), or one has come
                twice. With spare hosts, as many may be missing.
            KeeperFailed: there is no store.
        """
        if self._deadline is None:
            if not self.keeper.is_ready():
                return None
            self._deadline = time.monotonic() + self._timeout_s
            self._announce()
        self._accept()
        missing = self._info.world_size - len(self._hosts)
        is_late = time.monotonic() >= self._deadline
        if missing <= (self._spares if is_late else 0) and not self._problem:
            return self._met()
        if not self._problem:
            self._check(is_late)
        if self._problem:
            for link in (*self._links.values(), *self._newcomers):
                link.send({"error": self._problem})
            raise RendezvousError(self._problem)
        return None

    def wait(self, seconds: float) -> None:
        """Waits until `look` may have something to do, and no longer than that."""
        own = (*self.keeper.private[:1],) if self._deadline is None else ()
        wait_for(self._newcomers, (*own, *([self._listener.fileno()] if self._listener else ())), seconds)

    def _announce(self) -> None:
        if self._listener is not None:
            address, port = self._listener.getsockname()
            where = {"address": address, "port": port, "identity": self._info.identity, "nonce": self._nonce}
            write_json(self._file, {**where, "host": self._info.host})

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody is there, or whoever was has gone
                break
            self._newcomers.append(Link(connection))
        for link in self._newcomers[:]:
            messages = link.receive()
            if messages:
                self._greet(link, messages[0])
            if messages or not link.is_open:
                self._newcomers.remove(link)

    def _greet(self, link: Link, message: dict[str, Any]) -> None:
        number, host = message.get("agent"), message.get("host")
        if message.get("nonce") != self._nonce or not isinstance(number, int) or number >= self._info.world_size:
            link.send({"leader": self._info.identity})
            link.close()
            return
        if number in self._hosts:
            self._problem = _doubled(number, f"the first on {self._hosts[number]}, the second on {host}")
            link.send({"error": self._problem})
            return
        self._hosts[number], self._links[number] = str(host), link
        assert self._deadline is not None
        left_s = max(0.0, self._deadline - time.monotonic())
        link.send({"leader": self._info.identity, "left_s": left_s})

    def _check(self, is_late: bool) -> None:
        """Looks for what makes it impossible to meet."""
        info, now = self._info, time.monotonic()
        if is_late:
            seats = [Seat(number, host, 0) for number, host in self._hosts.items()]
            self._problem = some_are_missing(info, seats, self._timeout_s)
        elif now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            latest = read_rendezvous_file(self._file) or {}
            if latest.get("identity") == info.identity and latest.get("nonce", self._nonce) != self._nonce:
                self._problem = _doubled(0, f"one on {info.host}")

    def _met(self) -> Met:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for link in self._newcomers:  # of nobody who has said a word
            link.close()
        hosts = tuple(self._hosts.get(number, "") for number in range(self._info.world_size))
        if absent := [f"agent {number}" for number, host in enumerate(hosts) if not host]:
            came = f"{first_few(absent)} did not come within {self._timeout_s:g} s"
            log.warning("%s; the job goes on with fewer spare hosts", came)
        where = {"address": self.keeper.address, "port": self.keeper.port}
        for link in self._links.values():
            link.send({"hosts": hosts, **where})
        return Met(hosts, **where, links=self._links)


def _doubled(number: int, where: str) -> str:
    return f"two processes are agent {number}, {where}; start every agent once, with submit.py or srun"


class Joining:
    """The meeting on every other agent.

    Args:
        info: its place among the agents.
        spec: the job.
        attempt: where the leader says where it listens.

    Raises:
        TopologyError: this host's network interface is not there, is down or has no address.
    """

    keeper = None

    def __init__(self, info: RankInfo, spec: JobSpec, attempt: Attempt) -> None:
        self._info, self._file, self._timeout_s = info, attempt.rendezvous, spec.rendezvous_timeout_s
        self._began: float | None = None
        """When it first looked: imports, between which it looks, may have taken long."""
        self._deadline = 0.0
        self._link: Link | None = None
        self._where: dict[str, Any] | None = None
        self._others = ""
        self._has_come = False
        """The leader has taken note of this agent."""
        self._fault: RendezvousError | None = None
        self._look_at = self._retry_at = self._connecting_until = 0.0
        self._pause_s = 0.25
        if spec.interface is not None:
            own_address(info, spec.interface, None)  # now, so that the host with the broken one is named

    @property
    def private(self) -> tuple[int, ...]:
        """Descriptors that no rank may hold open."""
        return ()

    def look(self) -> Met | None:
        """What came of it; None while it is not known.

        Raises:
            RendezvousError: the leader has not said where it listens, does not answer, or has said what is wrong.
            UnreachableError: nothing listens there, or another job's leader.
        """
        now = time.monotonic()
        if self._began is None:
            self._began, self._deadline = now, now + self._timeout_s
        met = self._hear(now)
        if met is not None:
            return met
        if now >= self._deadline:
            raise self._late()
        if now >= self._look_at and not self._has_come:
            self._look_at = now + (look_again_in_s(now - self._began) if self._link is None else LOOK_EVERY_S)
            self._read()
        if self._where is not None and self._link is None and now >= self._retry_at:
            self._connect(self._where, now)
        return None

    def wait(self, seconds: float) -> None:
        """Waits until `look` may have something to do, and no longer than that."""
        if self._link is not None:
            wait_for([self._link], (), seconds)
        else:
            time.sleep(max(0.0, min(seconds, self._look_at - time.monotonic())))

    def _read(self) -> None:
        """Reads the rendezvous file; what is in it that was not before is to be tried."""
        latest = read_rendezvous_file(self._file)
        if latest is None or latest == self._where:
            return
        if latest["identity"] != self._info.identity:
            self._others = latest["identity"]
            return
        if "error" in latest:
            raise RendezvousError(latest["error"])
        if self._link is not None:
            self._link.close()
        self._where, self._link, self._fault = latest, None, None
        self._retry_at, self._pause_s = 0.0, 0.25

    def _connect(self, where: dict[str, Any], now: float) -> None:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        code = connection.connect_ex((where["address"], where["port"]))
        if code not in (0, errno.EINPROGRESS):
            connection.close()
            self._failed(now, OSError(code, os.strerror(code)))
            return
        self._link, self._connecting_until = Link(connection), now + CONNECT_WITHIN_S
        self._link.send({"agent": self._info.rank, "host": self._info.host, "nonce": where["nonce"]})

    def _hear(self, now: float) -> Met | None:
        """Takes in what the leader has said."""
        link = self._link
        if link is None:
            return None
        for message in link.receive():
            if "error" in message:
                raise RendezvousError(message["error"])
            if "hosts" in message:
                hosts, address, port = message["hosts"], message["address"], message["port"]
                return Met(tuple(hosts), address, port, {0: link})
            if "left_s" in message:
                # It may have begun later than this agent, and waits as long: it knows who else is missing.
                self._has_come, self._deadline = True, now + message["left_s"] + GRACE_S
            elif "leader" in message:
                whose = f"another start of {message['leader']}"
                if message["leader"] != self._info.identity:
                    whose = f"{message['leader']}, not to {self._info.identity}"
                self._failed(now, UnreachableError(f"but the leader there belongs to {whose}"))
                return None
        if not link.is_open and self._has_come:
            raise RendezvousError(f"{first_of(self._info)} went away during rendezvous")
        if not link.is_open:
            fault = RendezvousError("but what answers there is not the leader of a job")
            self._failed(
                now, fault if link.error is None or isinstance(link.error, ConnectionResetError) else link.error
            )
        elif now >= self._connecting_until and not link.is_connected:
            self._failed(now, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        return None

    def _failed(self, now: float, fault: OSError | RendezvousError) -> None:
        """Notes why there is no connection; there will be another try, ever less often."""
        assert self._where is not None
        if isinstance(fault, OSError):
            fault = UnreachableError(unreachable(self._info, fault))
        if self._link is not None:
            self._link.close()
            self._link = None
        if str(fault) != str(self._fault):
            log.warning("%s; trying again until the deadline", announced(self._info, self._where, str(fault)))
        self._fault, self._retry_at, self._pause_s = fault, now + self._pause_s, min(self._pause_s * 2, 5.0)

    def _late(self) -> RendezvousError:
        if self._has_come:
            return RendezvousError(
                f"{first_of(self._info)} has come, but has not answered for {GRACE_S:g} s after its deadline"
            )
        if self._where is None:
            return RendezvousError(first_is_missing(self._info, self._file, self._others, self._timeout_s))
        fault = self._fault or RendezvousError("but what listens there does not answer")
        return type(fault)(f"{announced(self._info, self._where, str(fault))}; tried for {self._timeout_s:g} s")
