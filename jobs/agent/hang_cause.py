"""Which rank the others wait for, by the stacks of all ranks of a job that hangs. Pure."""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import blame
from jobs.blame import Failure, LastSeen
from jobs.frames import Frame, as_traceback, below_the_launcher, frames_in, own_frame
from workloads.errors import first_few
from workloads.steps.board import SCRIPT

_TORCH = re.compile(r"(site|dist)-packages/torch/")
_COLLECTIVES = re.compile(
    r"torch/distributed/(distributed_c10d|_functional_collectives|tensor/_collective_utils|c10d_logger)\.py$"
    r"|workloads/(training/collectives|steps/reduction)\.py$"
)


def main_thread(text: str) -> tuple[Frame, ...]:
    """The frames of a process's main thread below the launcher's own, outermost first.

    Args:
        text: all threads' as faulthandler writes them: the innermost frame first, and the main thread last.
    """
    last = text.rpartition("(most recent call first):")[2]
    return tuple(below_the_launcher(frames_in(last)[::-1]))


def waits_in(frames: Sequence[Frame]) -> str:
    """The collective that the innermost frames wait in, or "wait"; empty where they do something else."""
    own = [n for n, frame in enumerate(frames) if not (_TORCH.search(frame.file) or _COLLECTIVES.search(frame.file))]
    inner = frames[own[-1] + 1 :] if own else frames
    calls = [frame for frame in inner if _COLLECTIVES.search(frame.file)]
    if calls:
        return next((f.function for f in calls if _TORCH.search(f.file) and f.function != "wrapper"), calls[0].function)
    # A handle's own `wait` is C++, and has no frame.
    is_in_call = frames and re.search(r"\.wait\(", linecache.getline(frames[-1].file, frames[-1].line))
    return "wait" if is_in_call else ""


def _place(frames: Sequence[Frame]) -> Frame | None:
    """The innermost line of the user's own; else the innermost one; None where there is no stack."""
    return own_frame(frames) or (frames[-1] if frames else None)


@dataclass(frozen=True)
class Shown:
    """Where one rank is."""

    last: LastSeen
    text: str = ""
    """Its stacks, as faulthandler writes them; empty: it did not show them."""
    state: str = ""
    """Why not: "is stopped (SIGSTOP)"."""
    has_returned: bool = False
    """Whether its workload has returned; it may still run, to wait for the others."""
    woken: int | None = None
    """How often its main thread has been woken so far; None: not known."""
    cpu_s: float = 0.0
    """CPU seconds that it and the processes that it started have used so far."""

    @property
    def frames(self) -> tuple[Frame, ...]:
        return main_thread(self.text)

    @property
    def waits(self) -> str:
        return "" if self.has_returned else waits_in(self.frames)

    @property
    def is_in_backward(self) -> bool:
        """Whether autograd runs, in which DistributedDataParallel waits for other ranks without a frame of Python's."""
        return bool(self.frames) and self.frames[-1].function == "_engine_run_backward"

    def where(self) -> str:
        """`waits in all_reduce (train.py:112)` or `is in data (data.py:88, read)`."""
        place = _place(self.frames)
        if self.has_returned:
            return "has returned from its work"
        if self.state:
            return self.state
        if self.waits:
            what = f"waits in {self.waits}" if self.waits != "wait" else f"waits for others in {self.last.phase}"
            return what + (f" ({Path(place.file).name}:{place.line})" if place else "")
        phase = "the script" if self.last.phase == SCRIPT else self.last.phase
        return f"is in {phase}" + (f" ({place})" if place else "")


def root_cause(shown: Mapping[int, Shown], waited_s: float, when: float) -> Failure:
    """The rank that a job which hangs waits for.

    It is one that is stopped or does not wait while others do; else one that has returned while others wait for it;
    else it is behind by its step or phase; else it waits in another place than most.
    """
    failures = {rank: _failure(rank, one, when) for rank, one in shown.items()}
    rank = _cause(shown, failures)
    if rank is None:
        places = _count([one.where() for one in shown.values()])
        return _with(failures[min(shown)], f"{blame.UNDECIDED} for {waited_s:.0f} s: {places}")
    one = shown[rank]
    place = _place(one.frames)
    at = f" ({place})" if place else ""
    for_s = f" for {one.last.ago_s:.0f} s"
    rest = _count([other.where() for number, other in shown.items() if number != rank])
    if one.has_returned:
        return _with(failures[rank], f"{one.last.returned()} while {rest}")
    if one.state:
        message = f"{one.state}, and has been in {one.last.phase}{for_s}"
    elif one.waits:
        message = f"has waited in {one.waits}{at}" + (for_s if one.last.phase != SCRIPT else "")
    elif one.last.phase == SCRIPT:  # of which nobody knows when this began
        message = f"is in the script{at}"
    else:
        message = f"has been in {one.last.phase}{at}{for_s}"
    hint = "; did a rank skip a collective, or call an extra one?" if one.waits and len(shown) > 1 else ""
    return _with(failures[rank], message + (f"; {rest}" if rest else "") + hint)


def standstill(cause: Failure, stood_s: float, is_script: bool) -> str:
    """One line about a job that stands still: `no step for 60 s: rank 2 on node1 has been in data (data.py:88) ...`."""
    if cause.message.startswith(blame.UNDECIDED):
        return cause.message
    what = "no movement" if is_script else "no step"
    return f"{what} for {stood_s:.0f} s: rank {cause.rank} on {cause.host} {cause.message}"


def _failure(rank: int, one: Shown, when: float) -> Failure:
    if one.has_returned:
        return Failure(rank, one.last.host, when, "hang", "", place=one.last.left_at)
    place = own_frame(one.frames)
    stack = as_traceback(one.frames) if one.frames else ""
    return Failure(rank, one.last.host, when, "hang", "", stack, place=str(place) if place else "")


def _cause(shown: Mapping[int, Shown], failures: Mapping[int, Failure]) -> int | None:
    if len(shown) == 1:
        return min(shown)
    still = [rank for rank, one in shown.items() if one.state.startswith("is ")]
    if still:
        return min(still)
    last = {rank: one.last for rank, one in shown.items()}
    place = blame.places([*last.values()])
    returned = [rank for rank, one in shown.items() if one.has_returned]
    at_work = [rank for rank in shown if rank not in returned]
    working = [rank for rank in at_work if shown[rank].text and not shown[rank].waits]
    # On a busy host a rank may be too slow to show its stacks: it is named only if nobody is seen to work.
    working = working or [rank for rank in at_work if shown[rank].state]
    if 0 < len(working) < len(shown):
        return min(working, key=lambda rank: (place[rank], rank))
    if 0 < len(returned) <= len(at_work):
        return min(returned)
    lowest = min(place[rank] for rank in at_work or shown)
    behind = [rank for rank in at_work if place[rank] == lowest]
    if behind and 2 * len(behind) <= len(shown):
        return min(behind)
    odd, rest = blame.elsewhere(min(shown), failures, last)
    return min(odd) if odd and rest else None


_PLURALS = {"waits": "wait", "is": "are", "does": "do", "has": "have"}


def _count(places: Sequence[str]) -> str:
    """`7 ranks wait in all_reduce (train.py:112)`, the most frequent first."""
    texts = []
    for place, number in Counter(places).most_common():
        verb, space, rest = place.partition(" ")
        many = _PLURALS.get(verb, verb) + space + rest.replace("its ", "their ")
        texts.append(f"{number} ranks {many}" if number > 1 else f"1 rank {place}")
    return first_few(texts, 4)


def _with(failure: Failure, message: str) -> Failure:
    return replace(failure, message=" ".join(message.split())[:2000])


def as_text(shown: Mapping[int, Shown], waited_s: float) -> str:
    """All stacks for people, equal ones together."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rank, one in sorted(shown.items()):
        groups.setdefault((one.text, one.state, one.last.phase), []).append(rank)
    parts = [f"No rank had ended a step for {waited_s:.0f} s. The stacks of all ranks, equal ones together:"]
    for (text, state, phase), ranks in groups.items():
        who = first_few([f"rank {rank} on {shown[rank].last.host}" for rank in ranks], 8)
        parts.append(f"--- {who}: in {phase}{state and f', {state}'}\n{text or '(no stack)'}")
    return "\n\n".join(parts) + "\n"
