"""Decides for the whole job: it has heard from every host how its ranks do, and tells every agent what to do.

Runs in the agent of host 0. It does nothing by itself: messages come in, decisions go out, and time is passed in by
calling `step`. What it decides is final: the run directory then holds the result, or Slurm has ended the job.

From an agent: `{"ended": [...]}`, ranks that have ended or have said what ends them; `{"ranks": [...]}`, where each is;
`{"told": NUMBER}`, a signal that asks the job to end; `{"bye": true}`, no process is left.
To an agent: `{"look": true}`, `{"stop": true}`, `{"end": true}`.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jobs import blame
from jobs.blame import Failure, LastSeen
from jobs.run_dir import BY_ITSELF, Attempt, RunDirectory, read_json, write_json
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


@dataclass
class _Host:
    name: str
    ranks: range
    log: str
    is_here: bool = True
    """Its agent is connected."""
    said_bye: bool = False
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
class Leader:
    """The decisions of one attempt.

    Args:
        spec: the job.
        run: where the result goes.
        attempt: this incarnation.
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
            _Host(self._host_of[n * each], range(n * each, (n + 1) * each), str(self.attempt.agent_log(n)))
            for n in range(self.agents)
        ]
        self._seen = [_Seen() for _ in range(world_size)]
        self._settled_at: float | None = None
        self._told: tuple[int, float] | None = None
        self._ends_at = 0.0
        self._last_step = time.monotonic()
        limit = None if self.on_slurm else resources.time_min
        self._deadline = time.monotonic() + limit * 60 if limit else None

    # --- what is heard ------------------------------------------------------------------------------------------------

    def hear(self, host: int, message: dict[str, Any]) -> None:
        """Takes in what the agent of a host says."""
        now = time.monotonic()
        one = self._hosts[host]
        one.silent_s, one.has_come, one.has_answered = 0.0, True, True
        for rank, step, phase, since_s in message.get("ranks", ()):
            seen = self._seen[rank]
            seen.step, seen.phase, seen.since_s, seen.at = step, phase, since_s, now
        for end in message.get("ended", ()):
            self._hear_of_end(end)
        if "told" in message:
            one.told_at = one.told_at or time.time()
            self._told = self._told or (message["told"], now)
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
            self._decide(now)
            return True
        gone = all(host.said_bye or not host.is_here for host in self._hosts)
        return not gone and now < self._ends_at

    def _decide(self, now: float) -> None:
        failures = self._failures()
        own = [failure for failure in failures if failure.own]
        settle_s = SETTLE_S if own else SETTLE_LOST_PEER_S
        if self.on_slurm and any(failure.kind == "killed" and "SIGTERM" in failure.message for failure in own):
            settle_s = SETTLE_TERMINATED_S
        if self._told is not None:
            # Of what one rank or host met with, others may be told before it is heard of itself.
            if now - self._told[1] < SETTLE_S and self.on_slurm:
                return
            self._end_as_told(failures)
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
                        self.lose(number, f"has not answered for {ANSWER_WITHIN_S:g} s; its host or the network failed")
                return
            if now - self._settled_at > settle_s or all(seen.ended for seen in self._seen):
                self.fail(self._root_cause(failures))
        elif all(seen.ended for seen in self._seen):
            self._finish()
        elif self._deadline is not None and now > self._deadline:
            limit = self.spec.resources.time_min
            self._end(self._publish("failed", f"the time limit of {limit} min was reached; ask for more with --time"))

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

    def fail(self, failure: Failure) -> None:
        """Ends the job with this as its root cause."""
        self._end(self._publish("failed", failure.headline(), failure))

    def _end_as_told(self, failures: list[Failure]) -> None:
        """The job is ended from outside: by Slurm, which says why itself, or by whoever started it."""
        assert self._told is not None
        signum = self._told[0]
        own = [f for f in failures if f.own and not self._is_echo(f)]
        if self.on_slurm and own:
            self.fail(blame.blame(own))
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
            write_json(self.attempt.result, record)
        self._end(0)

    def _publish(self, status: str, error: str, failure: Failure | None = None) -> int:
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
