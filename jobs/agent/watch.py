"""Whether a job stands still, and whether it hangs. Runs in the leader; `Watch` is pure, and `Hangs` asks for stacks.

A job stands still if no rank has ended a step, or has entered or left a phase outside steps. Of ranks that run a user's
own program no steps are known: such a job stands still while some rank's main thread is calm, as its agent sees it.

That is said early (SAY_S). Slow is not hung, so the job is ended only by what the stacks show: at once where they prove
a deadlock (`Watch._is_deadlock`), else at a limit. Only time in which the leader itself ran counts: a suspended job
does not hang.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.agent.hang_cause import Shown, as_text, root_cause, standstill
from jobs.blame import Failure, LastSeen
from jobs.run_dir import Attempt, write_text
from jobs.spec import JobSpec
from workloads.steps.board import SCRIPT

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
SAY_S = 45.0
"""A standstill of so long, or of SAY_FACTOR of the longest steps, is logged; and again when it has doubled."""
SAY_FACTOR = 3.0
PROVE_S = 15.0
"""Between the two sets of stacks that may prove a deadlock: the second is the one that is said."""
IDLE = 0.05
"""A rank that uses less of a CPU than this computes nothing; gloo's threads look for messages meanwhile."""
CALM_PER_S = 0.5
"""A main thread that does not wait for other ranks may look now and then for what it does wait for."""
ANSWER_WITHIN_S = 5.0
"""For every agent to send its ranks' stacks."""
SILENT_S = 3.0
"""If a host has been silent for longer, it is not known whether its ranks move; it is lost soon, or comes back."""


class Watch:
    """Decides whether a job hangs, from where its ranks are, the time that has passed, and their stacks.

    Args:
        ranks: their number.
        timeout_s: seconds that a step may take; 0 turns the watch off; None adapts to the measured steps. Of a user's
            own program, seconds that a rank may wait for others.
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
        self._calm_s: Mapping[int, float] = {}
        self._has_moved = self._step_ended = self._was_apart = False
        self._steps_ended = 0
        self._longest_s = 0.0
        self.waited_s = 0.0
        """Since a rank last ended a step, or changed its phase."""
        self._stands_again()

    def _stands_again(self) -> None:
        """A rank has moved: whatever was known of the standstill is over."""
        self._stood_s = self._asked_at_s = 0.0
        self._limit_at_s: float | None = None
        """`stood_s` when the limit, or a further third of it, was last reached; `_before` has the stacks of then."""
        self._is_at_limit = False
        """Whether the stacks that were asked for last are those of the limit."""
        self._before: Mapping[int, Shown] = {}
        self._say_at_s = max(SAY_S, SAY_FACTOR * self._longest_s)
        self._last: tuple[float, Mapping[int, Shown]] = 0.0, {}
        """The last stacks, and `stood_s` when they were taken."""
        self._stands_still = False
        """Whether a rank waits for others, or all that have not returned stand still."""

    def hear(self, rank: int, step: int, phase: str) -> None:
        """Takes in where a rank is."""
        old_step, old_phase = self._at[rank]
        self._at[rank] = step, phase
        if step != old_step:
            self._has_moved = self._step_ended = True
        elif phase != old_phase and not {phase, old_phase} <= IN_STEPS:
            self._has_moved = self._was_apart = True

    def hear_calm(self, ranks: range, calm_s: Mapping[int, float]) -> None:
        """Takes in which of a host's ranks have main threads that are calm, and for how many seconds."""
        others = {rank: seconds for rank, seconds in self._calm_s.items() if rank not in ranks}
        self._calm_s = {**others, **calm_s}

    def look(self, passed_s: float) -> bool:
        """Lets time pass; whether the stacks are to be taken now."""
        if self._has_moved:
            if self._step_ended:
                if self._steps_ended and not self._was_apart:
                    self._longest_s = max(self._longest_s, self.waited_s)
                self._steps_ended += 1
                self._was_apart = False
            self._has_moved = self._step_ended = False
            self.waited_s = 0.0
            self._stands_again()
        self.waited_s += passed_s
        if self._timeout_s == 0:
            return False
        stood_s, limit_s = self.stood_s, self.limit_s
        if stood_s < self._stood_s:
            self._stands_again()
        self._stood_s = stood_s
        is_due = any(self._asked_at_s < at_s <= stood_s for at_s in (self._say_at_s - PROVE_S, self._say_at_s))
        if stood_s >= (limit_s if self._limit_at_s is None else self._limit_at_s + limit_s / 3):
            self._limit_at_s = stood_s
            self._is_at_limit = is_due = True
        if is_due:
            self._asked_at_s = stood_s
        return is_due

    @property
    def stood_s(self) -> float:
        """Seconds for which the job has stood still."""
        return min(self.waited_s, max(self._calm_s.values(), default=0.0)) if self.is_script else self.waited_s

    @property
    def is_script(self) -> bool:
        """Whether a rank runs a user's own program, of which no steps are known."""
        return any(phase == SCRIPT for _, phase in self._at)

    @property
    def _is_in_step(self) -> bool:
        return self._steps_ended > 0 and all(phase in IN_STEPS for _, phase in self._at)

    @property
    def limit_s(self) -> float:
        """Seconds after which a standstill may be a hang, and again after each further third of it."""
        if any(phase == "starting" for _, phase in self._at):
            return max(self._long_s, self._start_s)
        if self._timeout_s is not None and (self._is_in_step or self.is_script):
            return self._timeout_s
        if not self._is_in_step:
            return self._long_s
        return max(min(max(FLOOR_S, FACTOR * self._longest_s), self._long_s), 2 * self._longest_s)

    def hangs(self, shown: Mapping[int, Shown]) -> bool:
        """Whether the stacks prove a deadlock, or, at the limit, confirm a hang.

        They confirm it if a rank still waits at the same place, or if no rank has moved.
        """
        stood_s, is_at_limit = self._asked_at_s, self._is_at_limit
        (last_s, last), self._last = self._last, (stood_s, shown)
        unmoved = _unmoved(last, shown, stood_s - last_s)
        at_work = {rank for rank, one in shown.items() if not one.has_returned}
        self._stands_still = any(shown[rank].waits for rank in unmoved) or (
            len(at_work) < len(shown) and at_work <= unmoved
        )
        if last and stood_s - last_s >= PROVE_S - 1 and self._is_deadlock(shown, last, unmoved, stood_s - last_s):
            return True
        if not is_at_limit:
            return False
        self._is_at_limit = False
        before, self._before = self._before, shown
        if self._is_in_step and self._timeout_s is not None:
            return True
        if not before:
            return False
        unmoved = _unmoved(before, shown, self.limit_s / 3)
        if any(shown[rank].waits for rank in unmoved):
            return True
        running = sum(bool(one.text or one.state) for one in shown.values())
        return not self.is_script and len(unmoved) == len(shown) and (running > 1 or stood_s > LONG_S)

    def is_to_be_said(self) -> bool:
        """Whether it is time to say that the job stands still, after `hangs` has seen the stacks.

        Of a user's own program it is said only if a rank waits for others meanwhile, or if others have returned: one
        whose main thread is calm may well be computing.
        """
        if self._asked_at_s < self._say_at_s:
            return False
        self._say_at_s = 2 * self._asked_at_s
        return self._stands_still or not self.is_script

    def _is_deadlock(
        self, shown: Mapping[int, Shown], last: Mapping[int, Shown], unmoved: set[int], passed_s: float
    ) -> bool:
        """Whether nobody can ever wake up: every rank waits in a collective, has not moved, and nobody computes.

        All of them at one place may wait for a slow network; so some rank must wait at another place, or have returned.
        On CUDA, threads that wait compute: the limits alone hold there.
        """
        at_work = {rank for rank, one in shown.items() if not one.has_returned}
        if not at_work or any(self._at[rank][1] in _NEVER_EARLY for rank in at_work):
            return False
        if not at_work <= unmoved:
            return False
        # A rank in its backward pass waits, too, if it does not compute.
        if any(shown[rank].waits in ("", "wait") and not shown[rank].is_in_backward for rank in at_work):
            return False
        if any(shown[rank].woken is None for rank in at_work):
            return False
        used_s = [shown[rank].cpu_s - last[rank].cpu_s for rank in at_work]
        if not all(0 <= seconds < IDLE * passed_s for seconds in used_s):
            return False
        return len(at_work) < len(shown) or len({shown[rank].frames for rank in at_work}) > 1


_NEVER_EARLY = ("starting", "evaluation", "checkpoint")
"""Phases that end by themselves only, or at their limit."""


def _unmoved(before: Mapping[int, Shown], shown: Mapping[int, Shown], passed_s: float) -> set[int]:
    """The ranks that are where they were; a main thread that waits for others must not have been woken meanwhile."""
    found = set()
    for rank, one in shown.items():
        old = before.get(rank)
        if old is None or (one.text, one.state, one.has_returned) != (old.text, old.state, old.has_returned):
            continue
        if one.woken is not None and old.woken is not None:
            at_most = 1 if one.waits else max(1, CALM_PER_S * passed_s)
            if one.woken - old.woken > at_most:
                continue
        found.add(rank)
    return found


class Hangs:
    """Watches a job for a hang, and finds out which rank is the cause.

    Args:
        spec: the job.
        attempt: where the stacks are written.
        agents: the numbers of those that have ranks.
        send: sends a message to an agent, by its number.
    """

    def __init__(
        self, spec: JobSpec, attempt: Attempt, agents: Sequence[int], send: Callable[[int, dict[str, Any]], None]
    ) -> None:
        self._attempt, self._agents, self._send = attempt, tuple(agents), send
        self._ranks = spec.resources.shape.world_size
        self._watch = Watch(self._ranks, spec.watchdog_timeout_s, spec.collective_timeout_s, spec.rendezvous_timeout_s)
        self._asked_at: float | None = None
        self._question = 0
        self._answers: dict[int, Mapping[str, Any]] = {}

    def hear(self, host: int, message: Mapping[str, Any]) -> None:
        """Takes in what an agent says of its ranks: where they are, and their stacks."""
        ranks = [rank for rank, *_ in message.get("ranks", ())]
        for rank, step, phase, _ in message.get("ranks", ()):
            self._watch.hear(rank, step, phase)
        if ranks and "calm" in message:
            self._watch.hear_calm(range(min(ranks), max(ranks) + 1), dict(message["calm"]))
        if message.get("question") == self._question:
            self._answers[host] = message

    def look(
        self, passed_s: float, silent_s: float, last: Callable[[int], LastSeen], returned: Collection[int] = ()
    ) -> Failure | None:
        """The root cause, once the job is found to hang.

        Args:
            passed_s: seconds since the last look.
            silent_s: seconds since the most silent host was heard of.
            last: where a rank was last seen.
            returned: ranks whose workload has returned.
        """
        if silent_s > SILENT_S:
            self._asked_at = None
            return None
        if self._watch.look(passed_s) and self._asked_at is None:
            self._asked_at, self._answers = time.monotonic(), {}
            self._question += 1
            for number in self._agents:
                self._send(number, {"stacks": self._question})
        if self._asked_at is None:
            return None
        if len(self._answers) < len(self._agents) and time.monotonic() - self._asked_at < ANSWER_WITHIN_S:
            return None
        stood_s, self._asked_at = self._watch.stood_s, None
        shown = {rank: Shown(last(rank), has_returned=rank in returned) for rank in range(self._ranks)}
        for answer in self._answers.values():
            for group in answer["stacks"]:
                for rank in group["ranks"]:
                    shown[rank] = replace(shown[rank], text=group["text"], state=group["state"])
            for rank, woken, cpu_s in answer.get("counts", ()):
                shown[rank] = replace(shown[rank], woken=woken, cpu_s=cpu_s)
        with contextlib.suppress(OSError):
            write_text(self._attempt.stacks, as_text(shown, stood_s))
        hangs, is_to_be_said = self._watch.hangs(shown), self._watch.is_to_be_said()
        if not hangs and not is_to_be_said:
            return None
        cause = root_cause(shown, stood_s, time.time())
        if not hangs:
            log.warning("%s", standstill(cause, stood_s, self._watch.is_script))
            return None
        return replace(
            cause,
            message=f"{cause.message} (all stacks: {self._attempt.stacks})",
            log=str(self._attempt.log(cause.rank)),
        )
