"""The leader's child: it holds the store that all ranks use for as long as the leader lives, so it outlives every rank.

It also takes and renews the leader's lease and writes its status.json, since the leader must not wait for a file
system. It is a process of its own because a store's threads forbid forking. An agent that must not fork, and so starts
its ranks as interpreters, may as well have the store's threads: there it is a thread of the agent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from jobs import blame, processes
from jobs.agent.lease import GIVE_UP_S, Lease
from jobs.agent.signals import OF_AN_AGENT
from jobs.rank.identity import RankInfo
from jobs.run_dir import write_json
from jobs.spec import JobSpec

LATE_S = 30.0
"""Seconds after the rendezvous deadline, or the longest wait for a lease, at which a silent keeper counts as lost."""


class KeeperFailed(Exception):
    """There is no store. Args: the failure."""

    def __init__(self, failure: blame.Failure) -> None:
        super().__init__(failure.headline())
        self.failure = failure


class Keeper:
    """The child process, or the thread, from the leader's side.

    Args:
        info: the leader's place among the agents.
        spec: the job.
        attempt: the number of the attempt, for the lease.
        listener: where the store listens; this owns it.
        log: the agent's log, named in a failure.
    """

    def __init__(self, info: RankInfo, spec: JobSpec, attempt: int, listener: socket.socket, log: str) -> None:
        self._info, self._log = info, log
        self.address, self.port = listener.getsockname()
        """Of the store."""
        self._deadline = time.monotonic() + max(spec.rendezvous_timeout_s, GIVE_UP_S) + LATE_S
        import jobs.rank.store  # noqa: F401 - not in the child: what the ranks need, too, is imported once

        self._answer, answer = os.pipe()
        # The leader's end closes when the leader ends, however it ends.
        self._keep, keep = socket.socketpair()
        self._keep.setblocking(False)
        self._unsent = self._heard = self._text = b""
        leader = os.getpid()
        self.pid: int | None = None
        """The child's; None for a thread."""
        work = (info, spec, attempt, listener, log, answer, keep)
        if processes.why_not_fork() is not None:
            threading.Thread(target=_keep, args=work, name="keeper", daemon=True).start()
            return
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._answer)
            self._keep.close()
            _child(leader, *work)
        os.close(answer)
        keep.close()
        listener.close()

    @property
    def private(self) -> tuple[int, ...]:
        """Descriptors that no rank may hold open."""
        return (self._answer, self._keep.fileno())

    def is_ready(self) -> bool:
        """Whether the store is open, and the run directory leased.

        Raises:
            KeeperFailed: an earlier start still holds the run directory, or the like.
        """
        if self._text.endswith(b"\n"):
            return True
        while processes.is_readable(self._answer):
            data = os.read(self._answer, 1 << 16)
            if not data:
                raise self._failed("the process that holds the store ended and gave no reason")
            self._text += data
            if self._text.endswith(b"\n"):
                failure = blame.Failure.from_json(json.loads(self._text).get("failure"))
                if failure is not None:
                    raise KeeperFailed(failure)
                return True
        if time.monotonic() > self._deadline:
            raise self._failed("the process that holds the store does not answer")
        return False

    def write(self, path: Path, record: dict[str, Any]) -> None:
        """Has this written; not while it still waits for the file system with something earlier."""
        self._ask(str(path), record)

    def renew_lease(self, attempt: int) -> None:
        """Has the lease renewed, as `write` does."""
        self._ask("", attempt)

    def later_attempt(self) -> int:
        """The highest number of a later attempt that was found when the lease was to be renewed; -1: none."""
        with contextlib.suppress(OSError):
            self._heard += self._keep.recv(1 << 12)
        return max(map(int, self._heard.split(b"\n")[:-1]), default=-1)

    def _ask(self, path: str, what: Any) -> None:
        self._unsent = self._unsent or (json.dumps([path, what]) + "\n").encode()
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[self._keep.send(self._unsent) :]

    def _failed(self, why: str) -> KeeperFailed:
        info = self._info
        return KeeperFailed(blame.Failure(info.rank, info.host, time.time(), "lost_peer", why, log=self._log))

    def end(self) -> None:
        """Ends it, and so the store."""
        self._keep.close()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _child(leader: int, *work: Any) -> NoReturn:
    processes.die_with_parent(leader)
    gc.enable()
    # A signal for the job is the agent's to answer: ranks may still need the store while it ends them.
    for signum in OF_AN_AGENT:
        signal.signal(signum, signal.SIG_IGN)
    _keep(*work)
    sys.stderr.flush()
    os._exit(0)


def _keep(
    info: RankInfo, spec: JobSpec, attempt: int, listener: socket.socket, log: str, answer: int, keep: socket.socket
) -> None:
    """Opens the store, says what came of it, and keeps it until the leader ends."""
    store, record = None, {}
    lease = Lease.of(spec, info)
    try:
        from jobs.rank.store import serve

        lease.take(attempt, say=logging.getLogger(__name__).warning)
        store = serve(info, listener, spec.rendezvous_timeout_s)
    except BaseException as error:
        traceback.print_exc()
        record = {"failure": blame.failure_of(error, info.rank, info.host, time.time(), log).to_json()}
    text = (json.dumps(record) + "\n").encode()
    while text:
        text = text[os.write(answer, text) :]
    os.close(answer)
    if store is None:  # it ends with the last reference to it
        return
    for line in keep.makefile("rb"):
        path, record = json.loads(line)
        with contextlib.suppress(OSError):
            if path:
                write_json(Path(path), record)
            elif (later := lease.renew(record)) is not None:
                keep.sendall(f"{later}\n".encode())
