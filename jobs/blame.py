"""What ended each rank -> the one that ended the job. Pure; used wherever ranks are watched.

When a rank dies, its peers fail within a tenth of a second with connection errors of their own, and often print
them first. So order alone does not decide: a failure that is only the loss of a peer is blamed when there is no other.
"""

from __future__ import annotations

import re
import signal
import traceback
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from jobs.errors import one_line, shortened
from workloads.errors import first_few, in_words
from workloads.steps.board import PHASES

ENDS = "this rank ends: "
"""What a rank logs when an exception has ended it, after its record is written; its traceback follows in the log."""

OUT_OF_MEMORY = "killed by SIGKILL: its host's memory, or the job's share of it, was used up"

VANISHED = "ended and said nothing: it was killed (out of memory, or someone's kill -9), or its host failed"
"""What is said of an agent of which nobody knows how it ended."""

LONGEST_TRACEBACK, LONGEST_PART = 40_000, 8_000
"""Characters of a recorded traceback, and of one frame or message in it, whose frames must survive a long message."""

Kind = Literal["error", "exit", "killed", "agent", "lost_peer", "unreachable"]
"""agent: it is the agent of the rank's host that ended. The last two are about others: whom this rank lost, or could
never reach, which rank 0 knows nothing of."""


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

    @staticmethod
    def from_json(record: dict[str, Any] | None) -> Failure | None:
        """What `to_json` gave; None where it is not that."""
        try:
            failure = Failure(**record or {})
        except TypeError:
            return None
        texts = (failure.host, failure.kind, failure.message, failure.traceback, failure.log)
        numbers = isinstance(failure.rank, int) and isinstance(failure.when, (int, float))
        return failure if numbers and all(isinstance(text, str) for text in texts) else None

    def headline(self) -> str:
        """One line for people: who, where, what, and the log."""
        who = f"rank {self.rank}" if self.kind != "agent" else "the leader" if self.rank == 0 else "the agent"
        return f"{who} on {self.host}: {self.message}" + (f" (log: {self.log})" if self.log else "")


@dataclass(frozen=True)
class LastSeen:
    """Where a rank was last seen."""

    rank: int
    host: str
    step: str = ""
    """The last step that it ended; empty: none."""
    ago_s: float = 0.0
    phase: str = ""
    """What it was in then; empty: not known."""

    @property
    def number(self) -> int:
        return int(self.step) if self.step.isdecimal() else -1

    def __str__(self) -> str:
        phase = f" ({self.phase})" if self.phase else ""
        return (
            f"last in step {self.step}{phase}, {self.ago_s:.0f} s ago" if self.step else f"has not ended a step{phase}"
        )


# What gloo, NCCL and the store say when it is the other side that went away, each with a mark of its own: a user's
# "connection refused" by some server is the user's.
_LOST_PEER = re.compile(
    r"gloo/transport|\[c10d\]|\bnccl|tcpstore|socketpoll|store->|watchdog caught collective"
    r"|connection closed by peer \[|timed out waiting \d+ms|wait timeout after \d+ms|application timeout caused pair",
    re.IGNORECASE,
)
# What they say of this rank's own device or host, or its use of them.
_OWN = re.compile(
    r"cuda error|cuda failure|invalid (usage|argument)|internal error|duplicate gpu|out of memory"
    r"|no space left|too many open files|cannot allocate memory|shared memory segment",
    re.IGNORECASE,
)
_WATCHDOG = re.compile(
    r"watchdog (?:caught collective operation timeout|thread terminated with exception)", re.IGNORECASE
)
"""What a rank's log says before NCCL's watchdog aborts it."""


_ALIKE = re.compile(r"\bworkloads/(base\.py|steps/|training/)")


def _is_of_a_peer(text: str) -> bool:
    return bool(_LOST_PEER.search(text)) and not _OWN.search(text)


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
        if comes_from_torch and _is_of_a_peer(text):
            return "lost_peer"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "exit" if isinstance(error, SystemExit) else "error"


def failure_of(error: BaseException, rank: int, host: str, when: float, log: str) -> Failure:
    """The record a rank leaves of the exception that ended it."""
    if isinstance(error, SystemExit):
        message = f"called sys.exit({error.code!r}) before its work was done"
    else:
        message = in_words(error)
    return Failure(
        rank=rank,
        host=host,
        when=when,
        kind=kind_of(error),
        message=one_line(message),
        traceback=_traceback(error, log),
        log=log,
    )


def _traceback(error: BaseException, log: str) -> str:
    """The traceback, shortened where it is enormous; the rank's log has all of it."""
    parts = traceback.format_exception(type(error), error, _from_the_workload_on(error))
    return shortened("".join(shortened(part, LONGEST_PART, log) for part in parts), LONGEST_TRACEBACK, log)


def _from_the_workload_on(error: BaseException) -> TracebackType | None:
    """The traceback without its first frames where they are only the launcher's."""
    trace = error.__traceback__
    ours = "jobs.rank.run"
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_globals.get("__name__") == ours:
        trace = trace.tb_next
    return trace


def failure_of_exit(
    code: int, rank: int, host: str, when: float, log: str, end_of_log: str = "", *, is_done: bool = False
) -> Failure:
    """The record of a rank that ended without leaving one itself.

    Args:
        code: as subprocess has it: the exit status, or minus the signal that killed it.
        end_of_log: the end of the rank's log; read for SIGABRT and for an exit code other than 0.
        is_done: whether its work was done by then.
    """
    if code == -signal.SIGABRT:
        lines = end_of_log.splitlines()
        last = max((place for place, line in enumerate(lines) if _WATCHDOG.search(line)), default=len(lines))
        if _is_of_a_peer("\n".join(lines[last : last + 4])):  # NCCL says why on the lines after its error's name
            words = " ".join(lines[last][lines[last].lower().rindex("watchdog") :].split())
            return Failure(rank, host, when, "lost_peer", f"aborted by NCCL: {words}"[:2000], log=log)
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = {
            "SIGKILL": " (out of memory, or someone's kill -9)",
            "SIGTERM": " (someone's kill, or the scheduler's)",
        }.get(name, "")
        after = " after its work was done" if is_done else ""
        return Failure(rank, host, when, "killed", f"killed by {name}{hint}{after}", log=log)
    relation = "after" if is_done else "before"
    said = f": {line}" if code and (line := error_at_end(end_of_log)) else ""
    return Failure(rank, host, when, "exit", f"exited with code {code} {relation} its work was done{said}", log=log)


def failure_of_agent(code: int | None, rank: int, host: str, when: float, log: str, end_of_log: str = "") -> Failure:
    """The record of an agent that left none, in the place of its host's first rank; see failure_of_exit.

    Args:
        code: its exit status, or minus the signal that killed it; None where nobody knows.
    """
    if code is None:
        message = VANISHED
    elif code < 0:
        message = failure_of_exit(code, rank, host, when, log).message
    else:
        said = error_at_end(end_of_log)
        message = f"exited with code {code}" + (f": {said}" if said else "")
    return Failure(rank, host, when, "agent", message, log=log)


_ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b|\berror: |no such file|not found", re.IGNORECASE)


def error_at_end(log: str) -> str:
    """The last line of a log, if it looks like an error."""
    line = next((" ".join(line.split())[:300] for line in reversed(log.splitlines()) if line.strip()), "")
    line = re.sub(r"^\[rank\d+\]: ", "", line)  # torch's, once there is a process group
    return line if _ERROR.search(line) else ""


def root_cause(
    lost: Sequence[Failure], seen: Mapping[int, LastSeen], running: Collection[int] = (), done: Collection[int] = ()
) -> Failure:
    """The failure of a job in which no rank failed by itself: some gave up on others.

    The cause is the rank that is behind: one that others had to wait for has ended fewer steps, or it had not given up
    itself, or it waits in another place than most.

    Args:
        lost: of those that gave up; none is `own`.
        seen: where the ranks in `lost`, `running` and `done` were last seen.
        running: ranks that still ran at that time.
        done: ranks that had returned from their work.
    """
    first = blame(lost)
    others = {failure.rank: failure for failure in lost if failure.rank not in done}
    slow = set(running) - set(done)
    ranks = [*slow, *others]
    if first.kind == "unreachable" or not ranks:
        return first
    if done and len(done) <= len(ranks):
        return _left_early(first, [seen[rank] for rank in sorted(done)])

    place = _places([seen[rank] for rank in ranks])
    lowest = min(place.values())
    behind = [rank for rank in ranks if place[rank] == lowest]
    few = behind if 2 * len(behind) <= len(ranks) else ranks
    if slow & set(few):
        slowest = min(slow & set(few), key=lambda rank: (place[rank], rank))
        return _silent(first, seen[first.rank], seen[slowest], [seen[rank] for rank in sorted(slow - {slowest})])
    if done:
        late = others[min(few)]
        message = (
            f"was still in its work{_at(late)} ({seen[late.rank]}) when {len(done)} others had returned from theirs"
        )
        return replace(late, message=f"{message}: {late.message}"[:2000])
    if few is behind:
        odd, rest = behind, [rank for rank in others if rank not in behind]
    else:
        odd, rest = _elsewhere(first.rank, others, seen)
    if odd and rest:
        return _apart(others, seen, first.rank if first.rank in odd else min(odd), rest)
    return _undecided(first, seen[first.rank], [seen[rank] for rank in sorted({*ranks} - {first.rank})])


def _places(seen: Sequence[LastSeen]) -> dict[int, tuple[int, int]]:
    """How far each rank has come: its step, and its phase in that step where all name theirs."""
    order = {phase: number for number, phase in enumerate(PHASES)}
    is_named = all(one.phase in order and one.phase not in ("training", "other") for one in seen)
    return {one.rank: (one.number, order[one.phase] if is_named else 0) for one in seen}


def _elsewhere(first: int, others: Mapping[int, Failure], seen: Mapping[int, LastSeen]) -> tuple[list[int], list[int]]:
    """The ranks that waited in another place than most, and the others; none where there are no most."""
    places = {rank: (seen[rank].number, _frames(others[rank])) for rank in sorted(others, key=lambda r: r == first)}
    (number, frames), count = Counter(places.values()).most_common(1)[0]
    if 2 * count < len(others):
        return [], []
    odd = [r for r, (n, f) in places.items() if n != number or (f and frames and f != frames)]
    return odd, [rank for rank in others if rank not in odd]


def _apart(others: Mapping[int, Failure], seen: Mapping[int, LastSeen], rank: int, rest: Sequence[int]) -> Failure:
    """The failure of a rank that waited for `rest`, which waited for it."""
    one, other = others[rank], others[rest[0]]
    them = f"rank {other.rank}" if len(rest) == 1 else f"{len(rest)} others"
    return replace(
        one,
        message=f"waited{_at(one)} ({seen[rank]}), and {them}{_at(other)} ({seen[other.rank]}); did a rank skip a "
        f"collective, or call an extra one? {one.message}"[:2000],
    )


def _frames(failure: Failure) -> tuple[tuple[str, ...], ...]:
    """The places of a traceback, outermost first: (file, line, function).

    Without torch's own, nor what is below a call of ours that all ranks make alike: in it each may wait elsewhere.
    """
    found = re.findall(r'^  File "(.+)", line (\d+), in (\S+)', failure.traceback, re.MULTILINE)
    frames = [frame for frame in found if not re.search(r"(site|dist)-packages/torch/", frame[0])]
    ours = (place for place, frame in enumerate(frames) if place and _ALIKE.search(frame[0]))
    return tuple(frames[: next(ours, len(frames))])


def _at(failure: Failure) -> str:
    """` at train.py:52 in step`, where a rank waited; empty where its traceback does not tell."""
    frames = _frames(failure)
    if not frames:
        return ""
    file, line, function = frames[-1]
    return f" at {Path(file).name}:{line} in {function}"


def _silent(failure: Failure, waited: LastSeen, cause: LastSeen, also: Sequence[LastSeen]) -> Failure:
    """`failure` gave up on ranks that still ran; the traceback shows what it waited in."""
    more = _list(also)
    message = f"did not fail, but still ran ({cause}) when rank {failure.rank} on {waited.host} ({waited})"
    return _instead(
        failure, cause.rank, cause.host, f"{message} gave up waiting" + (f"; so did {more}" if more else "")
    )


def _undecided(failure: Failure, waited: LastSeen, rest: Sequence[LastSeen]) -> Failure:
    """`failure` gave up first, and nothing tells which rank kept it waiting: where each of them was."""
    if not rest:
        return failure
    message = f"gave up waiting ({waited}), and nothing tells for which of {_list(rest)}: {failure.message}"
    return replace(failure, message=message[:2000])


def _list(seen: Sequence[LastSeen]) -> str:
    return first_few([f"rank {one.rank} on {one.host} ({one})" for one in seen], 7)


def _left_early(failure: Failure, done: Sequence[LastSeen]) -> Failure:
    """`failure` lost ranks that had returned from their work."""
    first, also = done[0], first_few([f"rank {one.rank}" for one in done[1:]], 7)
    message = f"returned from its work ({first})" + (f" (and {also})" if also else "")
    message += f" while rank {failure.rank} was still in its own, and lost it"
    return _instead(failure, first.rank, first.host, message)


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
