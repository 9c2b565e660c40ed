"""Whether a run can end its step and save in the time that it gets: before its time limit, and after SIGTERM.

A request comes in the middle of a step, is agreed on as that one ends, and is followed as the next one ends; then comes
a save. How long both take is measured while the run goes on, and held against the time that was set aside.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.spec import LEAD_S, JobSpec

log = logging.getLogger(__name__)

MARGIN_S = 10.0
"""Seconds for the request to come to all hosts, and for the ranks to end after the save."""


def seconds_left(spec: JobSpec, env: Mapping[str, str]) -> float | None:
    """From the agent's start to the job's time limit; None where that is not known.

    Slurm says it from 23.02 on (SLURM_JOB_END_TIME). Before, it is counted from the agent's start, which is late by a
    prolog and a site's set-up; but Slurm never ends a job early.
    """
    if spec.executor == "slurm" and env.get("SLURM_JOB_END_TIME", "").isdecimal():
        return float(env["SLURM_JOB_END_TIME"]) - time.time()
    limit = spec.resources.time_min
    return None if limit is None else 60.0 * limit


@dataclass
class LeadTime:
    """The longest step and the longest save so far, beside the time that is set aside for them.

    Args:
        lead_s: how long before the limit ranks are asked to stop, whatever they have taken so far.
        ends_at: when the job reaches its limit, by time.monotonic; None where that is not known.
        limit_s: how long that was when the agent started.
        asks: whether nobody else asks ranks to stop at `lead_s`; Slurm does.
        grace_s: how long ranks have from SIGTERM on; 0: no time at all.
    """

    lead_s: float
    ends_at: float | None
    limit_s: float = 0.0
    asks: bool = False
    grace_s: float = 0.0
    step_s: float = field(default=0.0, init=False)
    save_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._step = -1
        self._since_s = self._saving_s = 0.0
        """Since rank 0 last ended a step, and how much of it was a checkpoint."""
        self._has_warned = self._has_warned_of_grace = False

    @staticmethod
    def of(spec: JobSpec) -> LeadTime:
        left_s = seconds_left(spec, os.environ)
        limit_s, end = left_s or 0.0, None if left_s is None else time.monotonic() + left_s
        if spec.executor == "slurm":
            return LeadTime(spec.lead_s, end, limit_s, grace_s=spec.grace_s)
        return LeadTime(min(LEAD_S, limit_s / 4), end, limit_s, asks=True)

    @property
    def needed_s(self) -> float:
        """What a stop takes at most, by what was measured; 0 before a step has been."""
        return 2 * self.step_s + self.save_s + MARGIN_S if self.step_s else 0.0

    def hear(self, message: Mapping[str, Any]) -> None:
        """Takes in where ranks are. All are at the same step; rank 0 stands for them."""
        self.save_s = max(self.save_s, message.get("save_s", 0.0))
        for rank, step, phase, since_s in message.get("ranks", ()):
            if rank != 0:
                continue
            if step > self._step >= 0:
                took_s = (self._since_s - self._saving_s) / (step - self._step)
                self.step_s = max(self.step_s, took_s)
            if step != self._step:  # a smaller one is a restarted attempt's
                self._step, self._since_s, self._saving_s = step, 0.0, 0.0
            if phase == "checkpoint":
                self._saving_s = min(since_s, self._since_s)
                self.save_s = max(self.save_s, since_s)

    def look(self, passed_s: float) -> bool:
        """Lets time pass, in which the job was not suspended; whether ranks are to be asked to stop now."""
        self._since_s += passed_s
        is_short = self.needed_s > self.lead_s
        if is_short and self.lead_s and (self.ends_at is not None or not self.asks) and not self._has_warned:
            self._has_warned = True
            self._warn()
        if self.needed_s > self.grace_s > 0 and not self._has_warned_of_grace:
            self._has_warned_of_grace = True
            log.warning(
                "grace_s=%g is too short for a preemption or scancel: a stop may take %.0f s (%s), and what was done "
                "since the last checkpoint would be lost; set grace_s: %d in the cluster config if Slurm's "
                "GraceTime (scontrol show partition) allows it, or save more often",
                *(self.grace_s, self.needed_s, self._parts, math.ceil(self.needed_s)),
            )
        if self.ends_at is None or not (is_short or self.asks):
            return False
        # No more than half of the limit, otherwise a run would be stopped as it starts, again and again.
        lead_s = min(self.needed_s, self.limit_s / 2) if is_short else self.lead_s
        return time.monotonic() > self.ends_at - lead_s

    @property
    def _parts(self) -> str:
        return f"two steps of {self.step_s:.1f} s, a save of {self.save_s:.1f} s, {MARGIN_S:.0f} s to spare"

    def _warn(self) -> None:
        does = "ranks are asked to stop that much before it"
        if self.ends_at is None:
            does = "when it comes is not known here, so what was done since the last checkpoint may be lost"
        next_time = "" if self.asks else f"; submit with --sbatch signal=USR2@{round(self.needed_s)}"
        log.warning(
            "the lead time of %.0f s before the time limit is too short: a stop may take %.0f s (%s); %s%s",
            *(self.lead_s, self.needed_s, self._parts, does, next_time),
        )
