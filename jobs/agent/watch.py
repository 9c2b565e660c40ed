"""Whether a job hangs. Runs in the leader; `Watch` is pure, and `Hangs` asks the agents for stacks.

A job may hang if no rank has ended a step, or has entered or left a phase outside steps, for too long. Slow is not
hung, so the stacks must confirm it. Only time in which the leader itself ran counts: a suspended job does not hang.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.agent.hang_cause import Shown, as_text, root_cause
from jobs.blame import Failure, LastSeen
from jobs.run_dir import Attempt, write_text
from jobs.spec import JobSpec

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
            for number in self._agents:
                self._send(number, {"stacks": self._question})
        if self._asked_at is None:
            return None
        if len(self._answers) < len(self._agents) and time.monotonic() - self._asked_at < ANSWER_WITHIN_S:
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
