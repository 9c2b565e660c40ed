"""The agents of a job find each other, in a child process of each agent, because a store's threads forbid forking.

The child of the leader then holds the store that all ranks use, for as long as the leader lives: the store outlives
every rank. It also writes the leader's status.json and renews its lease, since the leader must not wait for a file
system. The other children end when the agents have met. An agent that must not fork, and so starts its ranks as
interpreters, may as well have the store's threads: there the meeting is a thread of the agent itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jobs import blame, processes
from jobs.agent.lease import Lease
from jobs.agent.signals import OF_AN_AGENT
from jobs.rank.identity import RankInfo
from jobs.run_dir import Attempt, write_json
from jobs.spec import JobSpec

LATE_S = 30.0
"""Seconds after the rendezvous deadline at which a meeting that has not answered counts as lost."""


@dataclass(frozen=True)
class Met:
    """What an agent knows once all hosts have met."""

    hosts: tuple[str, ...]
    """By their number, which is the agent's place among the agents."""
    node_rank: int
    address: str
    port: int
    """Of the store."""
    leader: dict[str, Any]
    """What the leader says of its connection for agents."""


class MeetingFailed(Exception):
    """The hosts did not meet. Args: the failure."""

    def __init__(self, failure: blame.Failure) -> None:
        super().__init__(failure.headline())
        self.failure = failure


class Meeting:
    """The child process, or the thread, from the agent's side.

    Args:
        info: the agent's place among the agents.
        spec: the job.
        attempt: where the leader announces the store.
        leader: what the other agents need for reaching the leader; from the leader only.
        log: the agent's log, named in a failure.
    """

    def __init__(self, info: RankInfo, spec: JobSpec, attempt: Attempt, leader: dict[str, Any], log: str) -> None:
        self._info, self._log = info, log
        self._deadline = time.monotonic() + spec.rendezvous_timeout_s + LATE_S
        from jobs.rank import rendezvous  # noqa: F401 - not in the child: what the ranks need, too, is imported once

        self._answer, answer = os.pipe()
        # The agent's end closes when the agent ends, however it ends.
        self._keep, keep = socket.socketpair()
        self._keep.setblocking(False)
        self._unsent = self._heard = b""
        agent = os.getpid()
        self.pid: int | None = None
        """The child's; None for a thread."""
        self._text = b""
        if processes.why_not_fork() is not None:
            threading.Thread(
                target=_meet, args=(info, spec, attempt, leader, log, answer, keep), name="meeting", daemon=True
            ).start()
            return
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._answer)
            self._keep.close()
            _meet_in_child(info, spec, attempt, leader, log, agent, answer, keep)
        os.close(answer)
        keep.close()

    @property
    def private(self) -> tuple[int, ...]:
        """Descriptors that no rank may hold open."""
        return (self._answer, self._keep.fileno())

    def result(self) -> Met | None:
        """What came of it; None while it is not known.

        Raises:
            MeetingFailed: hosts are missing, or this one cannot be reached, or the like.
        """
        while select.select([self._answer], [], [], 0)[0]:
            data = os.read(self._answer, 1 << 16)
            if not data:
                raise self._failed("the process that meets the other hosts ended and gave no reason")
            self._text += data
            if self._text.endswith(b"\n"):
                record = json.loads(self._text)
                if "failure" in record:
                    failure = blame.Failure.from_json(record["failure"])
                    assert failure is not None
                    raise MeetingFailed(failure)
                return Met(**{**record, "hosts": tuple(record["hosts"])})
        if time.monotonic() > self._deadline:
            raise self._failed("the process that meets the other hosts does not answer")
        return None

    def write(self, path: Path, record: dict[str, Any]) -> None:
        """Has the child write this, on the leader; not while it still waits for the file system with an earlier one."""
        self._ask(str(path), record)

    def renew_lease(self, attempt: int) -> None:
        """Has the child renew the lease, as `write` does."""
        self._ask("", attempt)

    def later_attempt(self) -> int:
        """The highest number of a later attempt that the child has found when it was to renew the lease; -1: none."""
        with contextlib.suppress(OSError):
            self._heard += self._keep.recv(1 << 12)
        return max(map(int, self._heard.split(b"\n")[:-1]), default=-1)

    def _ask(self, path: str, what: Any) -> None:
        self._unsent = self._unsent or (json.dumps([path, what]) + "\n").encode()
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[self._keep.send(self._unsent) :]

    def _failed(self, why: str) -> MeetingFailed:
        info = self._info
        return MeetingFailed(blame.Failure(info.rank, info.host, time.time(), "lost_peer", why, log=self._log))

    def end(self) -> None:
        """Ends the child and so, on the leader, the store."""
        self._keep.close()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _meet_in_child(
    info: RankInfo,
    spec: JobSpec,
    attempt: Attempt,
    leader: dict[str, Any],
    log: str,
    agent: int,
    answer: int,
    keep: socket.socket,
) -> NoReturn:
    processes.die_with_parent(agent)
    gc.enable()
    # A signal for the job is the agent's to answer: ranks may still need the store while it ends them.
    for signum in OF_AN_AGENT:
        signal.signal(signum, signal.SIG_IGN)
    _meet(info, spec, attempt, leader, log, answer, keep)
    sys.stderr.flush()
    os._exit(0)


def _meet(
    info: RankInfo, spec: JobSpec, attempt: Attempt, leader: dict[str, Any], log: str, answer: int, keep: socket.socket
) -> None:
    """Meets the others, says what came of it, and on the leader keeps the store."""
    store = None
    try:
        record, store = _join(info, spec, attempt, leader)
    except BaseException as error:
        traceback.print_exc()
        record = {"failure": blame.failure_of(error, info.rank, info.host, time.time(), log).to_json()}
    text = (json.dumps(record) + "\n").encode()
    while text:
        text = text[os.write(answer, text) :]
    os.close(answer)
    if info.rank == 0 and store is not None:  # the store ends with the last reference to it
        lease = Lease.of(spec, info)
        for line in keep.makefile("rb"):
            path, record = json.loads(line)
            with contextlib.suppress(OSError):
                if path:
                    write_json(Path(path), record)
                elif (later := lease.renew(record)) is not None:
                    keep.sendall(f"{later}\n".encode())


def _join(info: RankInfo, spec: JobSpec, attempt: Attempt, leader: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What `Met` holds, and the store."""
    from jobs.rank import rendezvous

    if info.rank == 0:  # all ranks connect to its store
        Lease.of(spec, info).take(attempt.number, say=logging.getLogger(__name__).warning)
        processes.allow_open_files(spec.resources.shape.world_size, info.host)
    meeting = rendezvous.join(
        info, "cpu", attempt.rendezvous, spec.rendezvous_timeout_s, spec.interface, spec.rendezvous_ports
    )
    if info.rank == 0:
        meeting.store.set("leader", json.dumps(leader))
    placement, store = meeting.placement, meeting.store.underlying_store  # type: ignore[attr-defined]
    record = {
        "hosts": placement.hosts,
        "node_rank": placement.node_rank,
        "address": store.host,
        "port": store.port,
        "leader": json.loads(meeting.store.get("leader")),
    }
    return record, meeting.store
