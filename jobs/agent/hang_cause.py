"""Which rank the others wait for, by the stacks of all ranks of a job that hangs. Pure."""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jobs import blame
from jobs.blame import Failure, LastSeen
from workloads.errors import first_few


class Frame(NamedTuple):
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}, {self.function}"


_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_TORCH = re.compile(r"(site|dist)-packages/torch/")
_LIBRARY = re.compile(r"/lib/python3[^/]*/|(site|dist)-packages/|^<frozen |\bworkloads/(base\.py|steps/|training/)")
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
    frames = [Frame(file, int(line), function) for file, line, function in reversed(_FRAME.findall(last))]
    ours = [place for place, frame in enumerate(frames) if frame.file.endswith("jobs/rank/run.py")]
    return tuple(frames[ours[-1] + 1 :] if ours and ours[-1] + 1 < len(frames) else frames)


def as_traceback(frames: Sequence[Frame]) -> str:
    """Frames as Python prints those of an exception."""
    lines = ["Stack of the main thread (most recent call last):"]
    for frame in frames:
        lines.append(f'  File "{frame.file}", line {frame.line}, in {frame.function}')
        source = linecache.getline(frame.file, frame.line).strip()
        lines += [f"    {source}"] if source else []
    return "\n".join(lines) + "\n"


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
    """The innermost line of the workload's own; else the innermost one; None where there is no stack."""
    own = [frame for frame in frames if not _LIBRARY.search(frame.file)]
    return own[-1] if own else frames[-1] if frames else None


@dataclass(frozen=True)
class Shown:
    """Where one rank is."""

    last: LastSeen
    text: str = ""
    """Its stacks, as faulthandler writes them; empty: it did not show them."""
    state: str = ""
    """Why not: "is stopped (SIGSTOP)"."""

    @property
    def frames(self) -> tuple[Frame, ...]:
        return main_thread(self.text)

    @property
    def waits(self) -> str:
        return waits_in(self.frames)

    def where(self) -> str:
        """`waits in all_reduce (train.py:112)` or `is in data (data.py:88, read)`."""
        place = _place(self.frames)
        if self.state:
            return self.state
        if self.waits:
            what = f"waits in {self.waits}" if self.waits != "wait" else f"waits for others in {self.last.phase}"
            return what + (f" ({Path(place.file).name}:{place.line})" if place else "")
        return f"is in {self.last.phase}" + (f" ({place})" if place else "")


def root_cause(shown: Mapping[int, Shown], waited_s: float, when: float) -> Failure:
    """The rank that a job which hangs waits for.

    It is one that is stopped or does not wait while others do; else it is behind by its step or phase; else it waits in
    another place than most.
    """
    failures = {
        rank: Failure(rank, one.last.host, when, "hang", "", as_traceback(one.frames) if one.frames else "")
        for rank, one in shown.items()
    }
    last = {rank: one.last for rank, one in shown.items()}
    rank = _cause(shown, failures, last)
    if rank is None:
        places = _count([one.where() for one in shown.values()])
        return _with(failures[min(shown)], f"no rank has ended a step for {waited_s:.0f} s: {places}")
    one = shown[rank]
    place = _place(one.frames)
    at = f" ({place})" if place else ""
    if one.state:
        message = f"{one.state}, and has been in {last[rank].phase} for {last[rank].ago_s:.0f} s"
    elif one.waits:
        message = f"has waited in {one.waits}{at} for {last[rank].ago_s:.0f} s"
    else:
        message = f"has been in {last[rank].phase}{at} for {last[rank].ago_s:.0f} s"
    rest = _count([other.where() for number, other in shown.items() if number != rank])
    hint = "; did a rank skip a collective, or call an extra one?" if one.waits and len(shown) > 1 else ""
    return _with(failures[rank], message + (f"; {rest}" if rest else "") + hint)


def _cause(shown: Mapping[int, Shown], failures: Mapping[int, Failure], last: Mapping[int, LastSeen]) -> int | None:
    if len(shown) == 1:
        return min(shown)
    still = [rank for rank, one in shown.items() if one.state.startswith("is ")]
    if still:
        return min(still)
    place = blame.places([*last.values()])
    working = [rank for rank, one in shown.items() if not one.waits and (one.text or one.state)]
    if 0 < len(working) < len(shown):
        return min(working, key=lambda rank: (place[rank], rank))
    lowest = min(place.values())
    behind = [rank for rank in shown if place[rank] == lowest]
    if 2 * len(behind) <= len(shown):
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
