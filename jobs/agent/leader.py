"""Decides for the whole job: it has heard from every host how its ranks do, and tells every agent what to do.

Runs in the agent of host 0. It does nothing by itself: messages come in, decisions go out, and time is passed in by
calling `step`. What it decides is final: the run directory then holds the result, or Slurm has ended the job.

From an agent: `{"ended": [...]}`, ranks that have ended or have said what ends them; `{"ranks": [...]}`, where each is;
`{"calm": [...]}`, those whose main threads are not woken; `{"stacks": [...], "counts": [...]}`, what it was asked for;
`{"told": NUMBER}`, a signal that asks the job to end; `{"asked": NAME}`, the signal by which ranks were asked to stop
after their step; `{"ready": true}`, no rank is left, as a restart asks for; `{"left": SECONDS}`, it ends, since it has
heard nothing for so long; `{"bye": true}`, no process is left.
To an agent: `{"look": true}`, `{"stacks": NUMBER}`, `{"stop": true}`, `{"restart": true}`,
`{"start": ATTEMPT, "places": [AGENT, ...]}`, `{"end": true, "code": CODE}`.

A restart in place has two steps, so that nothing of the failed attempt still writes when the next one reads: all agents
end their ranks; when each has said so, the next attempt's folder is made, and all start theirs. A spare host then takes
the place of one that is lost, or was the root cause twice.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs import blame
from jobs.agent.end_record import EndRecord
from jobs.agent.job_state import JobState
from jobs.agent.lead_time import LeadTime
from jobs.agent.restarts import Restarts
from jobs.agent.watch import Hangs
from jobs.blame import Failure
from jobs.excluded import FAILED_TWICE, NO_SPARE, exclude, is_due
from jobs.run_dir import TIME_LIMIT, Attempt, RunDirectory
from jobs.spec import JobSpec
from workloads.errors import reason

log = logging.getLogger(__name__)

SETTLE_S = 0.4
"""After a rank's own failure: for others that failed at the same moment to be heard of."""
SETTLE_LOST_PEER_S = 1.0
"""After the mere loss of a peer: for the peer itself to be seen dead."""
SETTLE_TERMINATED_S = 3.0
"""After a rank's death by SIGTERM on Slurm, which sends it to whole jobs: for the agents to get it, too."""
ANSWER_WITHIN_S = 5.0
"""After the mere loss of a peer: for every agent to say where its ranks are."""
END_WITHIN_S = 10.0
"""Seconds that agents get to end their ranks."""
SCRIPT_GRACE_S = 5.0
"""Seconds that a local script's own handlers get, when the job is interrupted or has reached its time limit."""

_WAS_DONE = "its work was done"


@dataclass
class _Restart:
    """A restart in place while ranks are ended."""

    cause: Failure
    by: float
    """When all agents must be ready, by time.monotonic."""
    without: int | None = None
    """The agent of a host that was the root cause twice; a spare host takes its place."""


@dataclass
class Leader:
    """The decisions of one start of the job, which has more than one attempt where it is restarted in place.

    Args:
        spec: the job.
        run: where the result goes.
        attempt: the first one; later the newest.
        hosts: the name of every host, by number; empty for one that has not come.
        agents: the number of agents; each but the spare hosts' has as many ranks. One may have those of all hosts.
        send: sends a message to an agent, by its number.
        on_slurm: whether Slurm ends the job, and says why; else whoever started it does.
    """

    spec: JobSpec
    run: RunDirectory
    attempt: Attempt
    hosts: tuple[str, ...]
    agents: int
    send: Callable[[int, dict[str, Any]], None]
    on_slurm: bool
    started: float = field(default_factory=time.time)
    """When the first attempt was started, in seconds since the epoch."""
    code: int | None = None
    """The exit code of every agent, once it is decided."""

    def __post_init__(self) -> None:
        self._state = JobState(self.spec, self.hosts, self.agents)
        self._restarts = Restarts(self.spec.max_restarts, self.run.restarts(), self.spec.is_script)
        self._begin(self.attempt, self.started)
        self._end_signal: tuple[int, float] | None = None
        self._ends_at = 0.0
        self._last_step = time.monotonic()
        limit = None if self.on_slurm else self.spec.resources.time_min
        self._deadline = time.monotonic() + limit * 60 if limit else None
        self._lead_time = LeadTime.of(self.spec)
        self._stopped_by = ""

    def _begin(self, attempt: Attempt, started: float) -> None:
        """Turns to an attempt, of which nothing is known yet."""
        self.attempt = attempt
        self._record = EndRecord(self.spec, self.run, attempt, started)
        self._state.begin(attempt)
        self._hangs = Hangs(self.spec, attempt, self._state.places, lambda n, message: self.send(n, message))
        self._settled_at: float | None = None
        self._restart: _Restart | None = None

    @property
    def error(self) -> str:
        """What has failed, once that is decided."""
        return self._record.error

    def status(self) -> dict[str, Any]:
        """Where the ranks are that have not ended, for whoever looks from outside."""
        return self._state.status()

    # --- what is heard ------------------------------------------------------------------------------------------------

    def hear(self, host: int, message: dict[str, Any]) -> None:
        """Takes in what the agent of a host says."""
        if not self._state.hosts[host].is_here:  # given up
            return
        self._state.hear(host, message)
        self._hangs.hear(host, message)
        self._lead_time.hear(message)
        if "left" in message:
            self.lose(host, blame.silence(message["left"], hears_others=False))
        if "told" in message:
            self._end_signal = self._end_signal or (message["told"], time.monotonic())
        self._stopped_by = self._stopped_by or message.get("asked", "")

    def lose(self, host: int, how: str = blame.VANISHED) -> None:
        """Notes that the agent of a host is gone."""
        one = self._state.hosts[host]
        if self.code is not None:  # it was to be
            one.is_here = False
        elif one.is_here:
            self._state.lose(host, how)
            self.send(host, {"end": True, "code": 1})  # should it hear that
            if not one.ranks:
                log.warning("the spare host %s: its agent %s", one.name, how)

    # --- what is decided ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Decides what can be decided; False when nothing is left to do."""
        now = time.monotonic()
        # In which this process ran, too: a suspended job loses nobody.
        passed, self._last_step = min(now - self._last_step, 1.0), now
        for number, how in self._state.pass_time(passed).items():
            self.lose(number, how)
        if self.code is None:
            self._decide(now, passed)
            return True
        gone = all(host.said_bye or not host.is_here for host in self._state.hosts)
        return not gone and now < self._ends_at

    def _decide(self, now: float, passed: float) -> None:
        failures = self._state.failures()
        own = [failure for failure in failures if failure.own]
        settle_s = SETTLE_S if own else SETTLE_LOST_PEER_S
        if self.on_slurm and any(failure.kind == "killed" and "SIGTERM" in failure.message for failure in own):
            settle_s = SETTLE_TERMINATED_S
        if self._end_signal is not None:
            # Of what one rank or host met with, others may be told before it is heard of itself.
            if now - self._end_signal[1] < SETTLE_S and self.on_slurm:
                return
            if failures or self._restart is not None or not self._has_grace(now):
                self._end_by_signal(failures)
            elif self._state.have_all_ended:
                self._finish()
        elif self._restart is not None:
            self._restart_when_ready(self._restart, now)
        elif failures:
            if self._settled_at is None:
                self._settled_at = now
                for host in self._state.hosts:
                    host.has_answered = False
                self._send_all({"look": True})
            silent = [number for number, host in enumerate(self._state.hosts) if host.is_silent]
            if silent and not own:
                if now - self._settled_at > ANSWER_WITHIN_S:
                    for number in silent:
                        self.lose(number, self._state.silence(number, ANSWER_WITHIN_S))
                return
            if now - self._settled_at > settle_s or self._state.have_all_ended:
                self._restart_or_fail(self._state.root_cause(), now)
        elif self._state.have_all_ended:
            self._finish()
        elif (hang := self._look_for_hang(passed)) is not None:
            self._restart_or_fail(hang, now)
        elif self._deadline is not None and now > self._deadline:
            limit = self.spec.resources.time_min
            error = f"the time limit of {limit} min was reached; ask for more with --time"
            self._end(self._record.publish("failed", error), signal.SIGTERM)
        elif self._lead_time.look(passed) and not self._stopped_by:
            log.warning("the time limit is near: every rank is asked to stop after its step")
            self._stopped_by = signal.SIGUSR2.name if self.on_slurm else TIME_LIMIT  # as if Slurm had warned
            self._send_all({"stop": True})

    def _look_for_hang(self, passed: float) -> Failure | None:
        state = self._state
        return self._hangs.look(passed, state.silent_s, state.last_seen, state.returned())

    def _has_grace(self, now: float) -> bool:
        """Whether ranks get to end their step and save: Slurm sends SIGTERM before it ends a job."""
        assert self._end_signal is not None
        signum, at = self._end_signal
        return self.on_slurm and signum == signal.SIGTERM and now - at < self.spec.grace_s

    def fail(self, failure: Failure, why_not: str) -> None:
        """Ends the job with this as its root cause; `why_not` says why it is not restarted."""
        decision = ""
        if not self._record.is_work_done:
            decision = f"not restarted: {why_not}" if self.spec.max_restarts else ""
            self._record.write_failure(failure, self._state, "the job has failed", why_not)
        error = failure.headline() + (decision and f"; {decision}")
        self._end(self._record.publish("failed", error, failure, decision=decision))

    def supersede(self, later: int) -> None:
        """Ends this start of the job: the scheduler has started it again, and that is the one that counts.

        With code 0, otherwise srun would kill its step on all hosts: Slurm gives the later start's the same number.
        """
        if self.code is None:
            self._record.publish("failed", f"the scheduler has started this job again (attempt {later})")
            self._end(0)

    def _restart_or_fail(self, cause: Failure, now: float) -> None:
        if self.run.has_begun(self.attempt.number + 1):
            self.supersede(self.attempt.number + 1)
            return
        why_not = self._restarts.why_not(cause, self._state.ranks[cause.rank].step)
        why_not = why_not or self._why_no_replacement()
        without = None
        if not why_not and is_due(self.spec, self.run, cause, self.attempt.number):
            if len(self._state.spares) > len(self._state.lost):
                without = next(n for n in self._state.places if cause.rank in self._state.hosts[n].ranks)
            else:
                why_not = FAILED_TWICE  # the batch script then requeues the job without that host
        if self._record.is_work_done or why_not:
            self.fail(cause, why_not or _WAS_DONE)
            return
        log.info("%s; all ranks are ended, and started again", cause.headline())
        self._restart = _Restart(cause, now + END_WITHIN_S, without)
        self._send_all({"restart": True})

    def _why_no_replacement(self) -> str:
        """Why a restart cannot do without the hosts that are lost; empty where it can, or none is."""
        hosts, lost, spares = self._state.hosts, self._state.lost, self._state.spares
        if not hosts[0].is_here:  # which has the store
            return f"the agent on {hosts[0].name} is gone"
        if len(lost) <= len(spares):
            return ""
        none_left = f", and {NO_SPARE}" if self.spec.resources.spares else ""
        return f"the agent on {hosts[lost[-1]].name} is gone{none_left}"

    def _restart_when_ready(self, restart: _Restart, now: float) -> None:
        """Begins the next attempt once no rank of the failed one is left."""
        cause = restart.cause
        if why_not := self._why_no_replacement():
            self.fail(cause, why_not)
            return
        if late := [number for number, host in enumerate(self._state.hosts) if host.is_here and not host.is_ready]:
            for number in late if now > restart.by else ():
                if self._state.hosts[number].has_come:
                    self.lose(number, f"has not ended its ranks within {END_WITHIN_S:g} s")
            return
        if self._record.is_work_done:  # while its last ranks were being ended
            self.fail(cause, _WAS_DONE)
            return
        number = self.attempt.number + 1
        decision = f"restarted as attempt {number} (restart {self._restarts.made + 1} of {self._restarts.at_most})"
        why = "a rank failed, and the agent of every host is well"
        leaving = self._state.lost
        if restart.without is not None and restart.without not in leaving and len(self._state.spares) > len(leaving):
            leaving = [*leaving, restart.without]
            exclude(self.run, cause)
        if leaving:
            replaced = ", ".join(self._state.replace(one) for one in leaving)
            decision, why = f"{decision}, {replaced}", "a spare host takes the place of each that is given up"
        # Before the folder is there, so that a follower that sees it knows why.
        self._record.write_failure(cause, self._state, decision, why)
        self._record.publish("failed", cause.headline(), cause, decision=decision, next_attempt=number)
        try:
            attempt = self.run.succeed(self.attempt)
        except OSError as error:
            is_superseded = isinstance(error, FileExistsError)
            why = "the scheduler has started this job again" if is_superseded else reason(error)
            with contextlib.suppress(OSError):
                self.attempt.result.unlink()  # it promises an attempt that there is not
            self.fail(cause, f"attempt {number} cannot be begun: {why}")
            return
        self._restarts.made += 1
        self._begin(attempt, time.time())
        self._send_all({"start": number, "places": self._state.places})

    def _end_by_signal(self, failures: list[Failure]) -> None:
        """The job is ended from outside: by Slurm, which says why itself, or by whoever started it."""
        assert self._end_signal is not None
        signum = self._end_signal[0]
        own = [f for f in failures if f.own and not self._state.died_of_end_signal(f)]
        if self.on_slurm and own:
            self.fail(blame.blame(own), "the job was told to end as well")
            return
        if self.on_slurm:
            log.warning("received %s: the job's ranks are ended", signal.Signals(signum).name)
        else:
            self._record.publish("interrupted", f"interrupted by {signal.Signals(signum).name}")
        self._end(1, signum)

    def _finish(self) -> None:
        """Every rank has done its work."""
        if self.spec.is_script:  # no rank knows how the others end
            self._record.publish_script(self._state.stopped_at)
        self._record.leave_memory([rank.peak_bytes for rank in self._state.ranks])
        self._record.complete([rank.death for rank in self._state.ranks if rank.death], self._stopped_by)
        self._end(0)

    def _end(self, code: int, by: int | None = None) -> None:
        """Ends the ranks; if that is `by` a signal, a local script gets it, as torchrun passes it on, and some time."""
        self.code = code
        self._ends_at = time.monotonic() + END_WITHIN_S
        message: dict[str, Any] = {"end": True, "code": code}
        if by is not None and self.spec.is_script and not self.on_slurm:
            message |= {"first": signal.SIGINT if by == signal.SIGINT else signal.SIGTERM, "grace_s": SCRIPT_GRACE_S}
        self._send_all(message)

    def _send_all(self, message: dict[str, Any]) -> None:
        for number in range(self.agents):
            self.send(number, message)
