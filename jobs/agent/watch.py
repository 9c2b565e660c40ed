"""Whether a job hangs, and which rank the others wait for. Runs in the leader; pure except for `Hangs`.

A job may hang if no rank has ended a step, or has entered or left a phase outside steps, for too long. Slow is not
hung, so the stacks must confirm it. Only time in which the leader itself ran counts: a suspended job does not hang.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jobs import blame
from jobs.blame import Failure, LastSeen
from jobs.run_dir import Attempt, write_text
from jobs.spec import JobSpec
from workloads.errors import first_few

log = logging.getLogger(__name__)

IN_STEPS = frozenset(("training", "data", "forward", "backward", "optimizer", "end_step"))
"""The phases of a step. A rank may be in any other one, including a user's own, for much longer."""
FLOOR_S = 300.0
"""The shortest limit for a step, unless the user sets one or a collective would time out before."""
FACTOR = 10.0
OF_COLLECTIVE = 0.6
"""The longest limit, as a part of the collective's time-out. Stacks that confirm the hang follow at 0.8 of it."""
LONG_S = 1800.0
"""One rank alone, which nobody waits for, hangs if its stack has not changed and this time has passed."""
ANSWER_WITHIN_S = 5.0
"""For every agent to send its ranks' stacks."""
SILENT_S = 3.0
"""If a host has been silent for longer, it is not known whether its ranks move; it is lost soon, or comes back."""


class Watch:
    """Decides whether a job hangs, from where its ranks are, the time that has passed, and two sets of stacks.

    Args:
        ranks: their number.
        timeout_s: seconds that a step may take; 0 turns the watch off; None adapts to the measured steps.
        collective_timeout_s: a hang is found before it.
        rendezvous_timeout_s: how long ranks may be "starting"; the rendezvous has its own deadline.
    """

    def __init__(
        self, ranks: int, timeout_s: float | None, collective_timeout_s: float, rendezvous_timeout_s: float
    ) -> None:
        self._timeout_s = timeout_s
        self._long_s = OF_COLLECTIVE * collective_timeout_s
        self._start_s = rendezvous_timeout_s + 30
        self._at = [(-1, "starting")] * ranks
        self._has_moved = self._step_ended = self._was_apart = False
        self._steps_ended = 0
        self._longest_s = 0.0
        self.waited_s = 0.0
        """Since a rank last moved."""
        self._asked_at_s: float | None = None
        """`waited_s` when stacks were last asked for."""
        self._before: Mapping[int, Shown] = {}
        """The stacks that were taken then."""

    def hear(self, rank: int, step: int, phase: str) -> None:
        """Takes in where a rank is."""
        old_step, old_phase = self._at[rank]
        self._at[rank] = step, phase
        if step != old_step:
            self._has_moved = self._step_ended = True
        elif phase != old_phase and not {phase, old_phase} <= IN_STEPS:
            self._has_moved = self._was_apart = True

    def look(self, passed_s: float) -> bool:
        """Lets time pass; whether the stacks are to be taken now."""
        if self._has_moved:
            if self._step_ended:
                if self._steps_ended and not self._was_apart:
                    self._longest_s = max(self._longest_s, self.waited_s)
                self._steps_ended += 1
                self._was_apart = False
            self._has_moved = self._step_ended = False
            self.waited_s, self._asked_at_s, self._before = 0.0, None, {}
        self.waited_s += passed_s
        if self._timeout_s == 0:
            return False
        limit_s = self.limit_s
        next_s = limit_s if self._asked_at_s is None else self._asked_at_s + limit_s / 3
        if self.waited_s < next_s:
            return False
        self._asked_at_s = self.waited_s
        return True

    @property
    def _is_in_step(self) -> bool:
        return self._steps_ended > 0 and all(phase in IN_STEPS for _, phase in self._at)

    @property
    def limit_s(self) -> float:
        """Seconds after which the stacks are taken, and again after each further third of it."""
        if any(phase == "starting" for _, phase in self._at):
            return max(self._long_s, self._start_s)
        if not self._is_in_step:
            return self._long_s
        if self._timeout_s is not None:
            return self._timeout_s
        return max(min(max(FLOOR_S, FACTOR * self._longest_s), self._long_s), 2 * self._longest_s)

    def hangs(self, shown: Mapping[int, Shown]) -> bool:
        """Whether the stacks confirm a hang: a rank still waits at the same place, or no rank's stack has changed."""
        before, self._before = self._before, shown
        if self._is_in_step and self._timeout_s is not None:
            return True
        if not before:
            return False
        same = {rank for rank, one in shown.items() if (one.text, one.state) == (before[rank].text, before[rank].state)}
        if any(shown[rank].waits for rank in same):
            return True
        running = sum(bool(one.text or one.state) for one in shown.values())
        return len(same) == len(shown) and (running > 1 or self.waited_s > LONG_S)


# --- what the stacks say ----------------------------------------------------------------------------------------------


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


# --- who is asked -----------------------------------------------------------------------------------------------------


class Hangs:
    """Watches a job for a hang, and finds out which rank is the cause.

    Args:
        spec: the job.
        attempt: where the stacks are written.
        agents: their number.
        send: sends a message to an agent, by its number.
    """

    def __init__(
        self, spec: JobSpec, attempt: Attempt, agents: int, send: Callable[[int, dict[str, Any]], None]
    ) -> None:
        self._attempt, self._agents, self._send = attempt, agents, send
        self._ranks = spec.resources.shape.world_size
        self._watch = Watch(self._ranks, spec.watchdog_timeout_s, spec.collective_timeout_s, spec.rendezvous_timeout_s)
        self._asked_at: float | None = None
        self._question = 0
        self._answers: dict[int, list[dict[str, Any]]] = {}

    def hear(self, host: int, message: Mapping[str, Any]) -> None:
        """Takes in what an agent says of its ranks: where they are, and their stacks."""
        for rank, step, phase, _ in message.get("ranks", ()):
            self._watch.hear(rank, step, phase)
        if message.get("question") == self._question:
            self._answers[host] = message["stacks"]

    def look(self, passed_s: float, silent_s: float, last: Callable[[int], LastSeen]) -> Failure | None:
        """The root cause, once the job is found to hang.

        Args:
            passed_s: seconds since the last look.
            silent_s: seconds since the most silent host was heard of.
            last: where a rank was last seen.
        """
        if silent_s > SILENT_S:
            self._asked_at = None
            return None
        if self._watch.look(passed_s) and self._asked_at is None:
            log.warning("no rank has ended a step for %.0f s: taking the stacks of all ranks", self._watch.waited_s)
            self._asked_at, self._answers = time.monotonic(), {}
            self._question += 1
            for number in range(self._agents):
                self._send(number, {"stacks": self._question})
        if self._asked_at is None:
            return None
        if len(self._answers) < self._agents and time.monotonic() - self._asked_at < ANSWER_WITHIN_S:
            return None
        waited_s, self._asked_at = self._watch.waited_s, None
        shown = {rank: Shown(last(rank)) for rank in range(self._ranks)}
        for group in (group for answer in self._answers.values() for group in answer):
            for rank in group["ranks"]:
                shown[rank] = Shown(last(rank), group["text"], group["state"])
        with contextlib.suppress(OSError):
            write_text(self._attempt.stacks, as_text(shown, waited_s))
        if waited_s < self._watch.limit_s or not self._watch.hangs(shown):
            return None
        cause = root_cause(shown, waited_s, time.time())
        return replace(
            cause,
            message=f"{cause.message} (all stacks: {self._attempt.stacks})",
            log=str(self._attempt.log(cause.rank)),
        )
