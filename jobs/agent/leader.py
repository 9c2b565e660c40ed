"""Decides for the whole job: it has heard from every host how its ranks do, and tells every agent what to do.

Runs in the agent of host 0. It does nothing by itself: messages come in, decisions go out, and time is passed in by
calling `step`. What it decides is final: the run directory then holds the result, or Slurm has ended the job.

From an agent: `{"ended": [...]}`, ranks that have ended or have said what ends them; `{"ranks": [...]}`, where each is;
`{"stacks": [...]}`, those that it was asked for; `{"told": NUMBER}`, a signal that asks the job to end;
`{"asked": NAME}`, the signal by which ranks were asked to stop after their step; `{"ready": true}`, no rank is left, as
a restart asks for; `{"bye": true}`, no process is left.
To an agent: `{"look": true}`, `{"stacks": NUMBER}`, `{"stop": true}`, `{"restart": true}`, `{"start": ATTEMPT}`,
`{"end": true}`.

A restart in place has two steps, so that nothing of the failed attempt still writes when the next one reads: all agents
end their ranks; when each has said so, the next attempt's folder is made, and all start theirs.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import blame
from jobs.agent.failure_record import failure_record
from jobs.agent.lead_time import LeadTime
from jobs.agent.restarts import Restarts
from jobs.agent.watch import Hangs
from jobs.blame import Failure, LastSeen
from jobs.excluded import FAILED_TWICE, is_due
from jobs.run_dir import BY_ITSELF, TIME_LIMIT, Attempt, RunDirectory, end_of, read_json, write_json
from jobs.spec import JobSpec
from jobs.status import status

log = logging.getLogger(__name__)

SETTLE_S = 0.4
"""After a rank's own failure: for others that failed at the same moment to be heard of."""
SETTLE_LOST_PEER_S = 1.0
"""After the mere loss of a peer: for the peer itself to be seen dead."""
SETTLE_TERMINATED_S = 3.0
"""After a rank's death by SIGTERM on Slurm, which sends it to whole jobs: for the agents to get it, too."""
TOLD_TOGETHER_S = 0.2
"""Seconds by which a rank may be seen to die of a signal before its agent has answered the same one."""
ANSWER_WITHIN_S = 5.0
"""After the mere loss of a peer: for every agent to say where its ranks are."""
END_WITHIN_S = 10.0
"""Seconds that agents get to end their ranks."""
SILENT_S = 60.0
"""An agent that has not been heard of for so long is lost; both sides say something each second."""


_WAS_DONE = "its work was done"


@dataclass
class _Host:
    name: str
    ranks: range
    log: str
    is_here: bool = True
    """Its agent is connected."""
    said_bye: bool = False
    is_ready: bool = False
    """It has ended its ranks, and waits for the next attempt."""
    has_come: bool = False
    """Whether it has been heard of at all: a host's imports may take long."""
    has_answered: bool = True
    """Whether it has been heard of since it was last asked."""
    told_at: float | None = None
    """When it said that it was told to end, in seconds since the epoch."""
    silent_s: float = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether it should have answered, and has not."""
        return self.is_here and self.has_come and not self.has_answered


@dataclass
class _Seen:
    """What is known of one rank."""

    step: int = -1
    phase: str = "starting"
    since_s: float = 0.0
    at: float = 0.0
    """When that was heard."""
    ended: bool = False
    done: bool = False
    failure: Failure | None = None
    death: str = ""
    """How it died after its work was done."""


@dataclass
class _Restart:
    """A restart in place while ranks are ended."""

    cause: Failure
    by: float
    """When all agents must be ready, by time.monotonic."""


@dataclass
class Leader:
    """The decisions of one start of the job, which has more than one attempt where it is restarted in place.

    Args:
        spec: the job.
        run: where the result goes.
        attempt: the first one; later the newest.
        hosts: the name of every host, by number.
        agents: the number of agents; each has as many ranks, in order. One agent may have those of all hosts.
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
    code: int | None = None
    """The exit code of every agent, once it is decided."""
    error: str = ""
    """What has failed, once that is decided."""

    def __post_init__(self) -> None:
        resources = self.spec.resources
        world_size = resources.shape.world_size
        each = world_size // self.agents
        self._host_of = [self.hosts[rank // resources.gpus_per_node] for rank in range(world_size)]
        self._hosts = [
            _Host(self._host_of[n * each], range(n * each, (n + 1) * each), log="") for n in range(self.agents)
        ]
        self._restarts = Restarts(self.spec.max_restarts, self.run.restarts())
        self._begin(self.attempt)
        self._told: tuple[int, float] | None = None
        self._ends_at = 0.0
        self._last_step = time.monotonic()
        limit = None if self.on_slurm else resources.time_min
        self._deadline = time.monotonic() + limit * 60 if limit else None
        self._lead_time = LeadTime.of(self.spec)
        self._stopped_by = ""

    def _begin(self, attempt: Attempt) -> None:
        """Turns to an attempt, of which nothing is known yet."""
        self.attempt, self.error = attempt, ""
        self._seen = [_Seen() for _ in self._host_of]
        self._hangs = Hangs(self.spec, attempt, self.agents, lambda number, message: self.send(number, message))
        self._settled_at: float | None = None
        self._restart: _Restart | None = None
        for number, host in enumerate(self._hosts):
            host.log, host.has_answered, host.is_ready = str(attempt.agent_log(number)), True, False

    # --- what is heard ------------------------------------------------------------------------------------------------

    def hear(self, host: int, message: dict[str, Any]) -> None:
        """Takes in what the agent of a host says."""
        now = time.monotonic()
        one = self._hosts[host]
        one.silent_s, one.has_come, one.has_answered = 0.0, True, True
        for rank, step, phase, since_s in message.get("ranks", ()):
            seen = self._seen[rank]
            seen.step, seen.phase, seen.since_s, seen.at = step, phase, since_s, now
        self._hangs.hear(host, message)
        self._lead_time.hear(message)
        for end in message.get("ended", ()):
            self._hear_of_end(end)
        if "told" in message:
            one.told_at = one.told_at or time.time()
            self._told = self._told or (message["told"], now)
        self._stopped_by = self._stopped_by or message.get("asked", "")
        if message.get("ready"):
            one.is_ready = True
        if message.get("bye"):
            one.said_bye = True

    def _hear_of_end(self, one: dict[str, Any]) -> None:
        seen = self._seen[one["rank"]]
        seen.ended, seen.done = seen.ended or one["ended"], one["done"]
        failure = Failure.from_json(one["failure"])
        if failure is not None and seen.failure is None:
            # Hosts' clocks differ; this one's counts.
            seen.failure = replace(failure, when=time.time() - one["ago_s"])
        seen.death = one["death"]

    def lose(self, host: int, how: str = blame.VANISHED) -> None:
        """Notes that the agent of a host is gone."""
        one = self._hosts[host]
        if not one.is_here:
            return
        one.is_here = False
        if one.said_bye or self.code is not None:
            return
        if one.told_at is not None:  # Slurm, or somebody, ends the whole job
            return
        where = self._seen[one.ranks[0]]
        if where.failure is None or not where.failure.own:
            where.failure = Failure(one.ranks[0], one.name, time.time(), "agent", how, log=one.log)
        for rank in one.ranks:
            self._seen[rank].ended = True

    # --- what is decided ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Decides what can be decided; False when nothing is left to do."""
        now = time.monotonic()
        # In which this process ran, too: a suspended job loses nobody.
        passed, self._last_step = min(now - self._last_step, 1.0), now
        for number, host in enumerate(self._hosts):
            host.silent_s += passed
            at_most_s = SILENT_S if host.has_come else max(SILENT_S, self.spec.rendezvous_timeout_s)
            if host.is_here and host.silent_s > at_most_s:
                self.lose(number, f"has said nothing for {at_most_s:g} s")
        if self.code is None:
            self._decide(now, passed)
            return True
        gone = all(host.said_bye or not host.is_here for host in self._hosts)
        return not gone and now < self._ends_at

    def _decide(self, now: float, passed: float) -> None:
        failures = self._failures()
        own = [failure for failure in failures if failure.own]
        settle_s = SETTLE_S if own else SETTLE_LOST_PEER_S
        if self.on_slurm and any(failure.kind == "killed" and "SIGTERM" in failure.message for failure in own):
            settle_s = SETTLE_TERMINATED_S
        if self._told is not None:
            # Of what one rank or host met with, others may be told before it is heard of itself.
            if now - self._told[1] < SETTLE_S and self.on_slurm:
                return
            if failures or self._restart is not None or not self._has_grace(now):
                self._end_as_told(failures)
            elif all(seen.ended for seen in self._seen):
                self._finish()
        elif self._restart is not None:
            self._restart_when_ready(self._restart, now)
        elif failures:
            if self._settled_at is None:
                self._settled_at = now
                for number, host in enumerate(self._hosts):
                    host.has_answered = False
                    self.send(number, {"look": True})
            silent = [
                n for n, host in enumerate(self._hosts) if host.is_here and host.has_come and not host.has_answered
            ]
            if silent and not own:
                if now - self._settled_at > ANSWER_WITHIN_S:
                    for number in silent:
                        # Which end of the network has failed cannot be known here: it may be this host's own.
                        between = f"its host, or the network between it and {self._hosts[0].name}, failed"
                        self.lose(number, f"has not answered for {ANSWER_WITHIN_S:g} s; {between}")
                return
            if now - self._settled_at > settle_s or all(seen.ended for seen in self._seen):
                self._restart_or_fail(self._root_cause(failures), now)
        elif all(seen.ended for seen in self._seen):
            self._finish()
        elif (hang := self._hangs.look(passed, self._silent_s, self._last_of)) is not None:
            self._restart_or_fail(hang, now)
        elif self._deadline is not None and now > self._deadline:
            limit = self.spec.resources.time_min
            self._end(self._publish("failed", f"the time limit of {limit} min was reached; ask for more with --time"))
        elif self._lead_time.look(passed) and not self._stopped_by:
            log.warning("the time limit is near: every rank is asked to stop after its step")
            self._stopped_by = signal.SIGUSR2.name if self.on_slurm else TIME_LIMIT  # as if Slurm had warned
            for number in range(len(self._hosts)):
                self.send(number, {"stop": True})

    def _has_grace(self, now: float) -> bool:
        """Whether ranks get to end their step and save: Slurm sends SIGTERM before it ends a job."""
        assert self._told is not None
        signum, at = self._told
        return self.on_slurm and signum == signal.SIGTERM and now - at < self.spec.grace_s

    @property
    def _silent_s(self) -> float:
        return max((host.silent_s for host in self._hosts if host.is_here), default=0.0)

    def _failures(self) -> list[Failure]:
        return [seen.failure for seen in self._seen if seen.failure is not None]

    def _root_cause(self, failures: list[Failure]) -> Failure:
        found = blame.blame(failures)
        if found.own:
            return found
        running = {rank for rank, seen in enumerate(self._seen) if not seen.ended and seen.failure is None}
        done = {rank for rank, seen in enumerate(self._seen) if seen.done}
        last = {rank: self._last_of(rank) for rank in range(len(self._seen))}
        return blame.root_cause(failures, last, running, done)

    def _last_of(self, rank: int) -> LastSeen:
        seen = self._seen[rank]
        ago_s = seen.since_s + (time.monotonic() - seen.at if seen.at else 0.0)
        return LastSeen(rank, self._host_of[rank], str(seen.step) if seen.step >= 0 else "", ago_s, seen.phase)

    def status(self) -> dict[str, Any]:
        """Where the ranks are that have not ended, for whoever looks from outside."""
        running = [self._last_of(rank) for rank, seen in enumerate(self._seen) if not seen.ended]
        return status(running, time.time(), max(seen.step for seen in self._seen))

    def fail(self, failure: Failure, why_not: str) -> None:
        """Ends the job with this as its root cause; `why_not` says why it is not restarted."""
        decision = ""
        if not self._work_is_done():
            decision = f"not restarted: {why_not}" if self.spec.max_restarts else ""
            self._record_failure(failure, "the job has failed", why_not)
        error = failure.headline() + (decision and f"; {decision}")
        self._end(self._publish("failed", error, failure, decision=decision))

    def _record_failure(self, cause: Failure, decision: str, why: str) -> None:
        others = [failure for failure in self._failures() if failure.rank != cause.rank]
        done = [rank for rank, seen in enumerate(self._seen) if seen.done]
        last = end_of(Path(cause.log), 10_000) if cause.log else ""
        record = failure_record(
            self.attempt.number, cause, self._last_of(cause.rank), last, others, done, decision, why
        )  # fmt: skip
        try:
            write_json(self.attempt.failure_record, record)
        except OSError as error:
            log.error("%s cannot be written: %s", self.attempt.failure_record, error)

    def supersede(self, later: int) -> None:
        """Ends this start of the job: the scheduler has started it again, and that is the one that counts.

        With code 0, otherwise srun would kill its step on all hosts: Slurm gives the later start's the same number.
        """
        if self.code is None:
            self._publish("failed", f"the scheduler has started this job again (attempt {later})")
            self._end(0)

    def _restart_or_fail(self, cause: Failure, now: float) -> None:
        if self.run.has_begun(self.attempt.number + 1):
            self.supersede(self.attempt.number + 1)
            return
        why_not = self._restarts.why_not(cause, self._seen[cause.rank].step)
        if lost := [host.name for host in self._hosts if not host.is_here]:
            why_not = why_not or f"the agent on {lost[0]} is gone"
        if not why_not and is_due(self.spec, self.run, cause, self.attempt.number):
            why_not = FAILED_TWICE  # the batch script then requeues the job without that host
        if self._work_is_done() or why_not:
            self.fail(cause, why_not or _WAS_DONE)
            return
        log.info("%s; all ranks are ended, and started again", cause.headline())
        self._restart = _Restart(cause, now + END_WITHIN_S)
        for number in range(len(self._hosts)):
            self.send(number, {"restart": True})

    def _restart_when_ready(self, restart: _Restart, now: float) -> None:
        """Begins the next attempt once no rank of the failed one is left."""
        cause = restart.cause
        if lost := [host.name for host in self._hosts if not host.is_here]:
            self.fail(cause, f"the agent on {lost[0]} was lost while the ranks were being ended")
            return
        if late := [number for number, host in enumerate(self._hosts) if not host.is_ready]:
            for number in late if now > restart.by else ():
                if self._hosts[number].has_come:
                    self.lose(number, f"has not ended its ranks within {END_WITHIN_S:g} s")
            return
        if self._work_is_done():  # while its last ranks were being ended
            self.fail(cause, _WAS_DONE)
            return
        number = self.attempt.number + 1
        decision = f"restarted as attempt {number} (restart {self._restarts.made + 1} of {self._restarts.at_most})"
        # Before the folder is there, so that a follower that sees it knows why.
        self._record_failure(cause, decision, "a rank failed, and the agent of every host is well")
        self._publish("failed", cause.headline(), cause, decision=decision, next_attempt=number)
        try:
            attempt = self.run.succeed(self.attempt)
        except OSError as error:
            is_superseded = isinstance(error, FileExistsError)
            why = "the scheduler has started this job again" if is_superseded else error.strerror or str(error)
            with contextlib.suppress(OSError):
                self.attempt.result.unlink()  # it promises an attempt that there is not
            self.fail(cause, f"attempt {number} cannot be begun: {why}")
            return
        self._restarts.made += 1
        self.started = time.time()
        self._begin(attempt)
        for host in range(len(self._hosts)):
            self.send(host, {"start": number})

    def _work_is_done(self) -> bool:
        return (read_json(self.attempt.result) or {}).get("status") in BY_ITSELF

    def _end_as_told(self, failures: list[Failure]) -> None:
        """The job is ended from outside: by Slurm, which says why itself, or by whoever started it."""
        assert self._told is not None
        signum = self._told[0]
        own = [f for f in failures if f.own and not self._is_echo(f)]
        if self.on_slurm and own:
            self.fail(blame.blame(own), "the job was told to end as well")
            return
        if self.on_slurm:
            log.warning("received %s: the job's ranks are ended", signal.Signals(signum).name)
        else:
            self._publish("interrupted", f"interrupted by {signal.Signals(signum).name}")
        self._end(1)

    def _is_echo(self, failure: Failure) -> bool:
        """Whether a rank met its end as its host was told to end: Slurm sends a signal to every process of a job."""
        told_at = next(host.told_at for host in self._hosts if failure.rank in host.ranks)
        return told_at is not None and failure.when > told_at - TOLD_TOGETHER_S

    def _finish(self) -> None:
        """Every rank has done its work."""
        deaths = [seen.death for seen in self._seen if seen.death]
        record = read_json(self.attempt.result)
        if record is not None and deaths:  # what is done is done: what came after it is told beside it
            record["warnings"] = deaths
        if record is not None and record["status"] == "stopped":
            record["stopped_by"] = self._stopped_by or "the workload"
            if self._stopped_by == TIME_LIMIT:
                limit = f"before its time limit of {self.spec.resources.time_min} min"
                record["error"] = record["error"].replace("by request", limit, 1)
        if record is not None and ("stopped_by" in record or deaths):
            write_json(self.attempt.result, record)
        self._end(0)

    def _publish(
        self,
        status: str,
        error: str,
        failure: Failure | None = None,
        *,
        decision: str = "",
        next_attempt: int | None = None,
    ) -> int:
        """Leaves the result, unless the work is done: then what came after it is a warning. Returns the exit code."""
        self.error = error
        record = {
            "status": status,
            "workload": self.spec.workload,
            "attempt": self.attempt.number,
            "seconds": round(time.time() - self.started, 3),
            "error": error,
            "traceback": failure.traceback if failure else "",
            "failure": failure.to_json() if failure else None,
            **({"decision": decision} if decision else {}),
            **({"next_attempt": next_attempt} if next_attempt is not None else {}),
        }
        try:
            there = self.run.publish(record)
            if there["status"] in BY_ITSELF and status == "failed":
                self.error = ""
                there["warnings"] = [*there.get("warnings", ()), error]
                write_json(self.attempt.result, there)
                return 0
        except OSError as unwritten:
            log.error("the result cannot be written: %s", unwritten)
        return 1

    def _end(self, code: int) -> None:
        self.code = code
        self._ends_at = time.monotonic() + END_WITHIN_S
        for number in range(len(self._hosts)):
            self.send(number, {"end": True, "code": code})
