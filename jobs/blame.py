"""The failures of a job's ranks -> the root cause. Pure; used wherever ranks are watched.

When a rank dies, its peers fail within a tenth of a second with connection errors, and often print them first. So the
order alone does not decide: the loss of a peer is a cascading failure, and the root cause only if there is no other.
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
from jobs.frames import as_traceback, at_fatal_error, place_in
from workloads.errors import first_few, in_words, message_of
from workloads.steps.board import PHASES, SCRIPT

ENDS = "this rank ends: "
"""Begins the line that a rank logs when an exception ends it, after its record is written; the traceback follows."""

OUT_OF_MEMORY = "killed by SIGKILL: its host's memory, or the job's share of it, was used up"

VANISHED = "ended without a record: it was killed (out of memory, or someone's kill -9), or its host failed"
"""The message for an agent if it is not known how it ended."""

LONGEST_TRACEBACK, LONGEST_PART = 40_000, 8_000
"""Maximum characters of a recorded traceback, and of one frame or message in it, so that long messages do not displace
frames."""

OUT_OF_TOUCH = "out of touch for "
UNDECIDED = "no rank has ended a step"
"""Begins the message about a hang of which no rank is known to be the cause."""


def silence(seconds: float, hears_others: bool) -> str:
    """The message for an agent that the leader does not hear.

    Args:
        seconds: for how long.
        hears_others: whether the leader hears those of other hosts. Otherwise it may itself be cut off.
    """
    if hears_others:
        return f"has not been heard for {seconds:g} s, and other hosts have: its host, or the network to it, failed"
    return f"{OUT_OF_TOUCH}{seconds:g} s; one of the two, its host, or the network between the hosts failed"


Kind = Literal["error", "exit", "killed", "hang", "agent", "lost_peer", "unreachable"]
"""hang: the other ranks waited for it. agent: the agent of the rank's host ended. The last two are about other ranks:
this rank lost a peer, or could never reach rank 0, which rank 0 does not notice."""


@dataclass(frozen=True)
class Failure:
    """What ended one rank."""

    rank: int
    host: str
    """Both hosts, as `node0 and node1`, where it is not known which of them failed."""
    when: float
    """Seconds since the epoch."""
    kind: Kind
    message: str
    """One line."""
    traceback: str = ""
    log: str = ""
    """The rank's log file."""
    place: str = ""
    """`train.py:52, run`: the line of the user's own code at which it happened; empty if not known."""

    @property
    def own(self) -> bool:
        """Whether the failure began in this rank, and is not the loss of another."""
        return self.kind not in ("lost_peer", "unreachable")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any] | None) -> Failure | None:
        """The failure from `to_json`'s record; None if the record is damaged."""
        try:
            failure = Failure(**record or {})
        except TypeError:
            return None
        texts = (failure.host, failure.kind, failure.message, failure.traceback, failure.log, failure.place)
        numbers = isinstance(failure.rank, int) and isinstance(failure.when, (int, float))
        return failure if numbers and all(isinstance(text, str) for text in texts) else None

    @property
    def is_between_hosts(self) -> bool:
        """Whether the leader and an agent are out of touch; `rank`, the agent's first, is then no cause."""
        return self.message.startswith(OUT_OF_TOUCH)

    def headline(self) -> str:
        """One line for the user: who, on which host, what, at which line, and the log."""
        agent = "the agents" if self.is_between_hosts else "the leader" if self.rank == 0 else "the agent"
        who = agent if self.kind == "agent" else f"rank {self.rank}"
        if self.message.startswith(UNDECIDED):  # its rank is any
            return self.message
        line = self.place.partition(",")[0]
        place = f" ({self.place})" if line and not re.search(rf"{re.escape(line)}\b", self.message) else ""
        return f"{who} on {self.host}: {self.message}{place}" + (f" (log: {self.log})" if self.log else "")


@dataclass(frozen=True)
class LastSeen:
    """A rank's last reported progress."""

    rank: int
    host: str
    step: str = ""
    """The last step that it finished; empty if there is none."""
    ago_s: float = 0.0
    phase: str = ""
    """Its phase at that time; empty if not known."""
    left_at: str = ""
    """`train.py:52, run`: where it called sys.exit or os._exit; empty if it did not, or it is not known."""

    @property
    def number(self) -> int:
        return int(self.step) if self.step.isdecimal() else -1

    def returned(self) -> str:
        """What it is called that its workload is over while others still work."""
        how = f"left its work at {self.left_at}" if self.left_at else "returned from its work"
        return f"{how} ({self})"

    def __str__(self) -> str:
        if not self.step and self.phase == SCRIPT:
            return "in the script, which has logged no step"
        if not self.step and self.phase == "ended":
            return "without having logged a step"
        phase = f" ({self.phase})" if self.phase else ""
        return (
            f"last in step {self.step}{phase}, {self.ago_s:.0f} s ago"
            if self.step
            else f"has not finished a step{phase}"
        )


# The messages of gloo, NCCL and the store when the peer is gone. Each needs a mark of theirs, otherwise the "connection
# refused" of a user's own server would match.
_LOST_PEER = re.compile(
    r"gloo/transport|\[c10d\]|\bnccl|tcpstore|socketpoll|store->|watchdog caught collective"
    r"|connection closed by peer \[|timed out waiting \d+ms|wait timeout after \d+ms|application timeout caused pair",
    re.IGNORECASE,
)
# Their messages about this rank's own device, host or arguments.
_OWN = re.compile(
    r"cuda error|cuda failure|invalid (usage|argument)|internal error|duplicate gpu|out of memory"
    r"|no space left|too many open files|cannot allocate memory|shared memory segment"
    # a torch or a machine without that backend, and a network interface that this host does not have
    r"|built[ -]in|only supported|not (?:supported|available)|no gpus found|unable to (?:find|resolve)",
    re.IGNORECASE,
)
_WATCHDOG = re.compile(
    r"watchdog (?:caught collective operation timeout|thread terminated with exception)", re.IGNORECASE
)
"""The line in a rank's log before NCCL's watchdog aborts the rank."""


_SHARED_CODE = re.compile(r"\bworkloads/(base\.py|steps/|training/)")


def _is_of_a_peer(text: str) -> bool:
    return bool(_LOST_PEER.search(text)) and not _OWN.search(text)


def kind_of(error: BaseException) -> Kind:
    """Whether an exception began in this rank, or its chain of causes contains the loss of a peer."""
    visited: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in visited:
        visited.add(id(cause))
        name = type(cause).__name__
        if name == "UnreachableError":
            return "unreachable"
        if name in ("DistNetworkError", "DistStoreError", "RendezvousError"):
            return "lost_peer"
        text = message_of(cause)
        comes_from_torch = name == "DistBackendError" or type(cause) is RuntimeError
        if comes_from_torch and _is_of_a_peer(text):
            return "lost_peer"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "exit" if isinstance(error, SystemExit) else "error"


def failure_of(error: BaseException, rank: int, host: str, when: float, log: str) -> Failure:
    """The record of an exception that ended a rank."""
    if isinstance(error, SystemExit):
        message = f"called sys.exit({error.code!r}) before its work was done"
    else:
        message = in_words(error)
    parts = traceback.format_exception(type(error), error, from_the_workload_on(error))
    return Failure(
        rank=rank,
        host=host,
        when=when,
        kind=kind_of(error),
        message=_GUESS.sub("", one_line(message)),
        traceback=_shortened(parts, log),
        log=log,
        place=place_in("".join(parts)),
    )


_GUESS = re.compile(r"\.? This is typically caused by a remote worker (?:hanging|crashing).*")
"""gloo's guess at why a peer is gone, which is known here, or will be."""


def _shortened(parts: Sequence[str], log: str) -> str:
    """A traceback, shortened if it is very long; the rank's log has all of it."""
    return shortened("".join(shortened(part, LONGEST_PART, log) for part in parts), LONGEST_TRACEBACK, log)


_LAUNCHER = ("jobs.rank.run", "jobs.rank.script", "jobs.processes", "workloads.script.main", "runpy")
"""Modules whose frames lie above those of a workload or a script."""


def from_the_workload_on(error: BaseException) -> TracebackType | None:
    """The traceback without the launcher's frames at its beginning."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_globals.get("__name__") in _LAUNCHER:
        trace = trace.tb_next
    return trace


_WHAT = re.compile(r"^terminate called after throwing .*\n\s*what\(\): +(.+)$", re.MULTILINE)
"""What C++ prints of an exception that nobody caught, before SIGABRT."""
_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL)
"""Signals that a rank raises by itself; faulthandler writes its stack into its log first."""


def failure_of_exit(
    code: int,
    rank: int,
    host: str,
    when: float,
    log: str,
    end_of_log: str = "",
    *,
    is_done: bool = False,
    call: str = "",
) -> Failure:
    """The record of a rank that ended without writing one.

    Args:
        code: as in subprocess: the exit status, or minus the signal that killed the rank.
        end_of_log: the end of the rank's log; read for signals of its own, and for an exit code other than 0.
        is_done: whether its work was done before.
        call: the stack of its call of os._exit; empty if there was none.
    """
    if code == -signal.SIGABRT:
        lines = end_of_log.splitlines()
        last = max((place for place, line in enumerate(lines) if _WATCHDOG.search(line)), default=len(lines))
        # NCCL gives the reason on the lines after the error's name
        if _is_of_a_peer("\n".join(lines[last : last + 4])):
            reason = " ".join(lines[last][lines[last].lower().rindex("watchdog") :].split())
            return Failure(rank, host, when, "lost_peer", f"aborted by NCCL: {reason}"[:2000], log=log)
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
        frames = at_fatal_error(end_of_log) if -code in _FAULTS else []
        stack = as_traceback(frames, "the thread that died") if frames else ""
        what = _WHAT.findall(end_of_log) if code == -signal.SIGABRT else []
        hint = f": {shortened(' '.join(what[-1].split()), 400, log)}" if what else hint
        message = f"killed by {name}{hint}{after}"
        return Failure(rank, host, when, "killed", message, stack, log, place_in(stack))
    relation = "after" if is_done else "before"
    error = f": {line}" if code and (line := error_at_end(end_of_log)) else ""
    how = f"called os._exit({code})" if call else f"exited with code {code}"
    return Failure(rank, host, when, "exit", f"{how} {relation} its work was done{error}", call, log, place_in(call))


def failure_of_agent(code: int | None, rank: int, host: str, when: float, log: str, end_of_log: str = "") -> Failure:
    """The record of an agent that wrote none, under the number of its host's first rank; see failure_of_exit.

    Args:
        code: its exit status, or minus the signal that killed it; None if not known.
    """
    if code is None:
        message = VANISHED
    elif code < 0:
        message = failure_of_exit(code, rank, host, when, log).message
    else:
        error = error_at_end(end_of_log)
        message = f"exited with code {code}" + (f": {error}" if error else "")
    return Failure(rank, host, when, "agent", message, log=log)


_ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b|\berror: |no such file|not found", re.IGNORECASE)


def error_at_end(log: str) -> str:
    """The last line of a log, if it looks like an error."""
    line = next((" ".join(line.split())[:300] for line in reversed(log.splitlines()) if line.strip()), "")
    line = re.sub(r"^\[rank\d+\]: ", "", line)  # torch's prefix once there is a process group
    return line if _ERROR.search(line) else ""


def root_cause(
    lost: Sequence[Failure], seen: Mapping[int, LastSeen], running: Collection[int] = (), done: Collection[int] = ()
) -> Failure:
    """The root cause in a job in which every failure is the loss of a peer.

    It is the rank for which the others waited: it had not given up itself, has finished fewer steps, or waited at
    another line than most.

    Args:
        lost: the failures of the ranks that gave up; none is `own`.
        seen: the last progress of the ranks in `lost`, `running` and `done`.
        running: ranks that were still running at that time.
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

    place = places([seen[rank] for rank in ranks])
    lowest = min(place.values())
    behind = [rank for rank in ranks if place[rank] == lowest]
    few = behind if 2 * len(behind) <= len(ranks) else ranks
    if slow & set(few):
        slowest = min(slow & set(few), key=lambda rank: (place[rank], rank))
        return _silent(first, seen[first.rank], seen[slowest], [seen[rank] for rank in sorted(slow - {slowest})])
    if done:
        late = others[min(few)]
        message = (
            f"was still working{_at(late)} ({seen[late.rank]}) when {len(done)} others had returned from their work"
        )
        return replace(late, message=f"{message}: {late.message}"[:2000])
    if few is behind:
        odd, rest = behind, [rank for rank in others if rank not in behind]
    else:
        odd, rest = elsewhere(first.rank, others, seen)
    if odd and rest:
        return _apart(others, seen, first.rank if first.rank in odd else min(odd), rest)
    return _undecided(first, seen[first.rank], [seen[rank] for rank in sorted({*ranks} - {first.rank})])


def places(progress: Sequence[LastSeen]) -> dict[int, tuple[int, int]]:
    """Each rank's progress: its step, and its phase within the step if all ranks report one."""
    order = {phase: number for number, phase in enumerate(PHASES)}
    is_named = all(rank.phase in order and rank.phase not in ("training", "other") for rank in progress)
    return {rank.rank: (rank.number, order[rank.phase] if is_named else 0) for rank in progress}


def elsewhere(first: int, others: Mapping[int, Failure], seen: Mapping[int, LastSeen]) -> tuple[list[int], list[int]]:
    """The ranks that waited at another place than most, and the others; both empty if there is no majority."""
    waited_at = {rank: (seen[rank].number, _frames(others[rank])) for rank in sorted(others, key=lambda r: r == first)}
    (number, frames), count = Counter(waited_at.values()).most_common(1)[0]
    if 2 * count < len(others):
        return [], []
    odd = [r for r, (n, f) in waited_at.items() if n != number or (f and frames and f != frames)]
    return odd, [rank for rank in others if rank not in odd]


def _apart(others: Mapping[int, Failure], seen: Mapping[int, LastSeen], rank: int, rest: Sequence[int]) -> Failure:
    """The failure of a rank that waited at another place than the ranks in `rest`."""
    failure, other = others[rank], others[rest[0]]
    them = f"rank {other.rank}" if len(rest) == 1 else f"{len(rest)} others"
    return replace(
        failure,
        message=f"waited{_at(failure)} ({seen[rank]}), and {them}{_at(other)} ({seen[other.rank]}); a rank may have "
        f"skipped a collective or called an extra one: {failure.message}"[:2000],
    )


def _frames(failure: Failure) -> tuple[tuple[str, ...], ...]:
    """The frames of a traceback, outermost first: (file, line, function).

    Leaves out torch's frames, and everything below a call into shared code (_SHARED_CODE), where ranks that made the
    same call may still wait at different lines.
    """
    matches = re.findall(r'^  File "(.+)", line (\d+), in (\S+)', failure.traceback, re.MULTILINE)
    frames = [frame for frame in matches if not re.search(r"(site|dist)-packages/torch/", frame[0])]
    shared = (place for place, frame in enumerate(frames) if place and _SHARED_CODE.search(frame[0]))
    return tuple(frames[: next(shared, len(frames))])


def _at(failure: Failure) -> str:
    """` at train.py:52 in step`, where a rank waited; empty if its traceback has no such frame."""
    frames = _frames(failure)
    if not frames:
        return ""
    file, line, function = frames[-1]
    return f" at {Path(file).name}:{line} in {function}"


def _silent(failure: Failure, waited: LastSeen, cause: LastSeen, also: Sequence[LastSeen]) -> Failure:
    """The root cause if `failure` gave up on ranks that were still running; the traceback shows where it waited."""
    more = _list(also)
    waiting = f"rank {failure.rank} on {waited.host} ({waited})"
    message = f"did not fail, but was still running ({cause}) when {waiting}{_at(failure)}"
    return _attributed(
        failure,
        cause.rank,
        cause.host,
        f"{message} gave up waiting" + (f"; also still running: {more}" if more else ""),
    )


def _undecided(failure: Failure, waited: LastSeen, rest: Sequence[LastSeen]) -> Failure:
    """`failure` gave up first, and it is not known which rank it waited for: lists where each of them was."""
    if not rest:
        return failure
    message = f"gave up waiting ({waited}), and it is not known for which of {_list(rest)}: {failure.message}"
    return replace(failure, message=message[:2000])


def _list(ranks: Sequence[LastSeen]) -> str:
    return first_few([f"rank {rank.rank} on {rank.host} ({rank})" for rank in ranks], 7)


def _left_early(failure: Failure, done: Sequence[LastSeen]) -> Failure:
    """The root cause if `failure` lost ranks that had returned from their work."""
    first, also = done[0], first_few([f"rank {rank.rank}" for rank in done[1:]], 7)
    message = first.returned() + (f" (and {also})" if also else "")
    message += f" while rank {failure.rank} was still working{_at(failure)} and lost its peer"
    return replace(_attributed(failure, first.rank, first.host, message), place=first.left_at)


def _attributed(failure: Failure, rank: int, host: str, message: str) -> Failure:
    """The failure attributed to another rank, whose log is in the same folder."""
    log = str(Path(failure.log).with_name(f"rank-{rank}.log")) if failure.log else ""
    message = f"{message}: {failure.message}"[:2000]
    return replace(failure, rank=rank, host=host, message=message, log=log, place="")  # it shows another's stack


def blame(failures: Sequence[Failure]) -> Failure:
    """The root cause: the earliest failure that is a rank's own; otherwise the earliest of all.

    A rank that could not reach rank 0 takes precedence over ranks that only waited: it knows why the rendezvous failed.
    """
    assert failures
    own = [failure for failure in failures if failure.own]
    unreachable = [failure for failure in failures if failure.kind == "unreachable"]
    return min(own or unreachable or failures, key=lambda failure: (failure.when, failure.rank))
