"""What ended each rank -> the one that ended the job. Pure; used wherever ranks are watched.

When a rank dies, its peers fail within a tenth of a second with connection errors of their own, and often print
them first. So order alone does not decide: a failure that is only the loss of a peer is blamed when there is no other.
"""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

ENDS = "this rank ends: "
"""What a rank logs when an exception has ended it, after its record is written; its traceback follows in the log."""

Kind = Literal["error", "exit", "killed", "lost_peer", "unreachable"]
"""The last two are about others: whom this rank lost, or could never reach, which rank 0 knows nothing of."""


@dataclass(frozen=True)
class Failure:
    """What ended one rank."""

    rank: int
    host: str
    when: float
    """Seconds since the epoch."""
    kind: Kind
    message: str
    """One line."""
    traceback: str = ""
    log: str = ""
    """The rank's log file."""

    @property
    def own(self) -> bool:
        """Whether it is this rank's own doing, and not what it met with in another."""
        return self.kind not in ("lost_peer", "unreachable")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def headline(self) -> str:
        """One line for people: who, where, what, and the log."""
        return f"rank {self.rank} on {self.host}: {self.message}" + (f" (log: {self.log})" if self.log else "")


# What gloo, NCCL and the store say when it is the other side that went away, each with a mark of its own: a user's
# "connection refused" by some server is the user's.
_LOST_PEER = re.compile(
    r"gloo/transport|\[c10d\]|\bnccl|tcpstore|socketpoll|store->|watchdog caught collective"
    r"|connection closed by peer \[|timed out waiting \d+ms|wait timeout after \d+ms|application timeout caused pair",
    re.IGNORECASE,
)
# What NCCL says of this rank's own device or use of it.
_OWN_NCCL = re.compile(
    r"unhandled cuda error|cuda failure|invalid (usage|argument)|internal error|duplicate gpu|out of memory",
    re.IGNORECASE,
)


def kind_of(error: BaseException) -> Kind:
    """Whether an exception is the rank's own, or only says that a peer is gone (anywhere in its chain of causes)."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        name = type(cause).__name__
        if name == "UnreachableError":
            return "unreachable"
        if name in ("DistNetworkError", "DistStoreError", "RendezvousError"):
            return "lost_peer"
        text = str(cause)
        comes_from_torch = name == "DistBackendError" or type(cause) is RuntimeError
        if comes_from_torch and _LOST_PEER.search(text) and not _OWN_NCCL.search(text):
            return "lost_peer"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "exit" if isinstance(error, SystemExit) else "error"


def failure_of(error: BaseException, rank: int, host: str, when: float, log: str) -> Failure:
    """The record a rank leaves of the exception that ended it."""
    if isinstance(error, SystemExit):
        message = f"called sys.exit({error.code!r}) before its work was done"
    else:
        text = " ".join(str(error).split())
        message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Failure(
        rank=rank,
        host=host,
        when=when,
        kind=kind_of(error),
        message=message if len(message) <= 2000 else message[:1997] + "...",
        traceback="".join(traceback.format_exception(type(error), error, _from_the_workload_on(error))),
        log=log,
    )


def _from_the_workload_on(error: BaseException) -> TracebackType | None:
    """The traceback without its first frames where they are only the launcher's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_globals.get("__name__") == "jobs.job":
        trace = trace.tb_next
    return trace


def failure_of_exit(code: int, rank: int, host: str, when: float, log: str) -> Failure:
    """The record of a rank that ended without leaving one itself.

    Args:
        code: as subprocess has it: the exit status, or minus the signal that killed it.
    """
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = {
            "SIGKILL": " (out of memory, or somebody's kill -9)",
            "SIGTERM": " (somebody's kill, or the scheduler's)",
        }.get(name, "")
        return Failure(rank, host, when, "killed", f"killed by {name}{hint}", log=log)
    return Failure(rank, host, when, "exit", f"exited with code {code} before its work was done", log=log)


def silent(failure: Failure, ranks: Sequence[tuple[int, str, str]]) -> Failure:
    """The failure of a job in which nobody failed of himself: some ranks gave up on others, which still run.

    Args:
        failure: of the first that gave up.
        ranks: those that still run: rank, host, and what they last did.

    Returns:
        That of the first of those ranks; the traceback is the other's, and shows what it waited in.
    """
    others = ", ".join(f"rank {rank} on {host} ({last})" for rank, host, last in ranks[1:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    also = f"; so did {others}{more}" if others else ""
    rank, host, last = ranks[0]
    return _instead(
        failure, rank, host, f"did not fail, but still ran ({last}) when rank {failure.rank} gave up waiting{also}"
    )


def left_early(failure: Failure, ranks: Sequence[tuple[int, str, str]]) -> Failure:
    """The failure of a job in which some ranks were done while others, who then lost them, were not.

    Args:
        failure: of the first that lost them.
        ranks: those that had returned from their work: rank, host, and what they last did.
    """
    others = ", ".join(f"rank {rank}" for rank, _, _ in ranks[1:8]) + (" and more" if len(ranks) > 8 else "")
    also = f" (and {others})" if others else ""
    rank, host, last = ranks[0]
    early = f"returned from its work ({last}){also} while rank {failure.rank} was still in its own, and lost it"
    return _instead(failure, rank, host, early)


def _instead(failure: Failure, rank: int, host: str, message: str) -> Failure:
    """The failure as one of another rank, whose log lies beside."""
    log = str(Path(failure.log).with_name(f"rank-{rank}.log")) if failure.log else ""
    return replace(failure, rank=rank, host=host, message=f"{message}: {failure.message}"[:2000], log=log)


def blame(failures: Sequence[Failure]) -> Failure:
    """The failure that ended the job: the earliest that is not merely the loss of a peer, else the earliest.

    Who could not reach rank 0 knows why the ranks did not meet; the others know only that they did not.
    """
    assert failures
    own = [failure for failure in failures if failure.own]
    unreachable = [failure for failure in failures if failure.kind == "unreachable"]
    return min(own or unreachable or failures, key=lambda failure: (failure.when, failure.rank))
