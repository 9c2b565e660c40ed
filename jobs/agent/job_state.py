"""What is known of a job's hosts and ranks, from what their agents say. Decides nothing, writes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs import blame
from jobs.blame import Failure, LastSeen
from jobs.run_dir import Attempt
from jobs.spec import JobSpec
from jobs.status import status

SILENT_S = 60.0
"""An agent that has not been heard of for so long is lost; both sides say something each second."""
END_SIGNAL_SKEW_S = 0.2
"""Seconds by which a rank may be seen to die of a signal before its agent has reported the same one."""


@dataclass
class HostState:
    """What is known of one agent."""

    name: str
    ranks: range = range(0)
    """None on a spare host."""
    log: str = ""
    is_here: bool = True
    """Its agent is connected."""
    said_bye: bool = False
    is_ready: bool = False
    """It has ended its ranks, and waits for the next attempt."""
    has_come: bool = False
    """Whether it has been heard of at all: a host's imports may take long."""
    has_answered: bool = True
    """Whether it has been heard of since it was last asked."""
    end_signal_at: float | None = None
    """When it reported a signal that asks the job to end, in seconds since the epoch."""
    silent_s: float = 0.0
    was_replaced: bool = False
    """A spare host has taken its place."""

    @property
    def is_silent(self) -> bool:
        """Whether it should have answered, and has not."""
        return self.is_here and self.has_come and not self.has_answered


@dataclass
class RankState:
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
    stopped_at: int | None = None
    """The step after which a script has stopped because it was asked to."""
    peak_bytes: int | None = None
    """The most memory that it has held, by its own word."""
    left_at: str = ""
    """Where it ended its work by a call, such as sys.exit; empty where it returned."""


def first_places(host_names: Sequence[str], count: int) -> list[int]:
    """The agents that have ranks at first: as many as there are to be, of those that have come.

    Args:
        host_names: the host of every agent, by its number; empty for one that has not come.
        count: how many have ranks.
    """
    return [number for number, name in enumerate(host_names) if name][:count]


class JobState:
    """All hosts and ranks of one attempt.

    Args:
        spec: the job.
        host_names: the name of every host, by number; empty for one that has not come.
        agents: the number of agents; each but the spare hosts' has as many ranks. One may have those of all hosts.
    """

    def __init__(self, spec: JobSpec, host_names: Sequence[str], agents: int) -> None:
        resources = spec.resources
        self._rendezvous_timeout_s = spec.rendezvous_timeout_s
        self._shape, self._names = resources.shape, host_names
        self.hosts = [HostState(host_names[n], is_here=bool(host_names[n])) for n in range(agents)]
        self.places = first_places(host_names[:agents], agents - resources.spares)
        """The agents that have ranks, in the order of these."""
        self.ranks: list[RankState] = []

    def begin(self, attempt: Attempt) -> None:
        """Turns to an attempt, of which nothing is known yet."""
        self.ranks = [RankState() for _ in range(self._shape.world_size)]
        nodes_each = self._shape.nodes // len(self.places)
        names = [self._names[number + node] for number in self.places for node in range(nodes_each)]
        self._host_of = [name for name in names for _ in range(self._shape.gpus_per_node)]
        each = len(self.ranks) // len(self.places)
        for number, host in enumerate(self.hosts):
            host.log, host.has_answered, host.is_ready = str(attempt.agent_log(number)), True, False
            host.ranks = range(0)
        for place, number in enumerate(self.places):
            self.hosts[number].ranks = range(place * each, (place + 1) * each)

    def replace(self, number: int) -> str:
        """Gives an agent's place to the first spare host from the next attempt on; what that is called."""
        spare = self.spares[0]
        self.places[self.places.index(number)] = spare
        self.hosts[number].was_replaced = True
        return f"spare host {self.hosts[spare].name} in place of {self.hosts[number].name}"

    # --- what is heard ------------------------------------------------------------------------------------------------

    def hear(self, host: int, message: Mapping[str, Any]) -> None:
        """Takes in what the agent of a host says."""
        now = time.monotonic()
        one = self.hosts[host]
        one.silent_s, one.has_come, one.has_answered = 0.0, True, True
        for number, step, phase, since_s in message.get("ranks", ()):
            rank = self.ranks[number]
            rank.step, rank.phase, rank.since_s, rank.at = step, phase, since_s, now
        for end in message.get("ended", ()):
            self._hear_of_end(end)
        if "told" in message:
            one.end_signal_at = one.end_signal_at or time.time()
        if message.get("ready"):
            one.is_ready = True
        if message.get("bye"):
            one.said_bye = True

    def _hear_of_end(self, one: Mapping[str, Any]) -> None:
        rank = self.ranks[one["rank"]]
        rank.ended, rank.done = rank.ended or one["ended"], one["done"]
        failure = Failure.from_json(one["failure"])
        if failure is not None and rank.failure is None:
            # Hosts' clocks differ; this one's counts.
            rank.failure = replace(failure, when=time.time() - one["ago_s"])
        rank.death, rank.stopped_at = one["death"], one.get("stopped_at")
        rank.left_at, rank.peak_bytes = one.get("left_at", ""), one.get("peak_bytes")

    def lose(self, host: int, how: str) -> None:
        """Notes that the agent of a host is gone."""
        one = self.hosts[host]
        if not one.is_here:
            return
        one.is_here = False
        if one.said_bye or one.end_signal_at is not None:  # Slurm, or somebody, ends the whole job
            return
        if not one.ranks:  # a spare host
            return
        first = self.ranks[one.ranks[0]]
        if first.failure is None or not first.failure.own:
            where = f"{self.hosts[0].name} and {one.name}" if how.startswith(blame.OUT_OF_TOUCH) else one.name
            first.failure = Failure(one.ranks[0], where, time.time(), "agent", how, log=one.log)
        for rank in one.ranks:
            self.ranks[rank].ended = True

    def pass_time(self, passed_s: float) -> dict[int, str]:
        """Lets time pass; the agents that have been silent for too long, by number, with what that is called."""
        silent = {}
        for number, host in enumerate(self.hosts):
            host.silent_s += passed_s
            at_most_s = SILENT_S if host.has_come else max(SILENT_S, self._rendezvous_timeout_s)
            if host.is_here and host.silent_s > at_most_s:
                silent[number] = self.silence(number, at_most_s)
        return silent

    def silence(self, number: int, seconds: float) -> str:
        """What it is called that an agent has not been heard for so long."""
        others = [host for other, host in enumerate(self.hosts) if other not in (0, number) and host.is_here]
        return blame.silence(seconds, any(host.has_come and host.silent_s < seconds / 2 for host in others))

    # --- what follows from it -----------------------------------------------------------------------------------------

    @property
    def silent_s(self) -> float:
        """Seconds since the most silent host was heard of."""
        return max((host.silent_s for host in self.hosts if host.is_here), default=0.0)

    @property
    def have_all_ended(self) -> bool:
        """Whether no rank runs any more."""
        return all(rank.ended for rank in self.ranks)

    @property
    def lost(self) -> list[int]:
        """The agents of ranks that are gone."""
        return [number for number in self.places if not self.hosts[number].is_here]

    @property
    def spares(self) -> list[int]:
        """The agents that can take a place."""
        can = [host.is_here and not host.was_replaced for host in self.hosts]
        return [number for number, ready in enumerate(can) if ready and number not in self.places]

    def failures(self) -> list[Failure]:
        return [rank.failure for rank in self.ranks if rank.failure is not None]

    def done(self) -> list[int]:
        """The ranks whose work is done."""
        return [number for number, rank in enumerate(self.ranks) if rank.done]

    @property
    def stopped_at(self) -> int | None:
        """The step after which a script has stopped because it was asked to; None: it has not."""
        return max((rank.stopped_at for rank in self.ranks if rank.stopped_at is not None), default=None)

    def returned(self) -> set[int]:
        """The ranks whose workload has returned; such a one may still wait for the others."""
        return {number for number, rank in enumerate(self.ranks) if rank.done or rank.phase == "ended"}

    def root_cause(self) -> Failure:
        """The failure that all others follow from; there must be one."""
        failures = self.failures()
        found = blame.blame(failures)
        if found.own:
            return found
        running = {number for number, rank in enumerate(self.ranks) if not rank.ended and rank.failure is None}
        last = {number: self.last_seen(number) for number in range(len(self.ranks))}
        return blame.root_cause(failures, last, running, set(self.done()))

    def last_seen(self, number: int) -> LastSeen:
        """Where a rank was when it was last heard of."""
        rank = self.ranks[number]
        ago_s = rank.since_s + (time.monotonic() - rank.at if rank.at else 0.0)
        step = str(rank.step) if rank.step >= 0 else ""
        return LastSeen(number, self._host_of[number], step, ago_s, rank.phase, rank.left_at)

    def died_of_end_signal(self, failure: Failure) -> bool:
        """Whether a rank died as its host was told to end: Slurm sends a signal to every process of a job."""
        signal_at = next(host.end_signal_at for host in self.hosts if failure.rank in host.ranks)
        return signal_at is not None and failure.when > signal_at - END_SIGNAL_SKEW_S

    def status(self) -> dict[str, Any]:
        """Where the ranks are that have not ended, for whoever looks from outside."""
        running = [self.last_seen(number) for number, rank in enumerate(self.ranks) if not rank.ended]
        return status(running, time.time(), max(rank.step for rank in self.ranks))
