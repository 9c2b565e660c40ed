"""The agent: one process a host that starts its ranks, watches them, and ends them together.

On Slurm srun starts it, one a host, and the agent of host 0 leads. The local executor starts one, which has the ranks
of all emulated hosts. It never computes, and it never waits: everything happens in one loop.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from jobs import blame, processes, secret_values
from jobs.agent import binding, feeds, ranks
from jobs.agent.job_state import SILENT_S, first_places
from jobs.agent.keeper import Keeper, KeeperFailed
from jobs.agent.leader import Leader
from jobs.agent.lease import LEASE_S, RENEW_EVERY_S, Lease
from jobs.agent.link import Link
from jobs.agent.meeting import Gathering, Joining, Met
from jobs.agent.memory import OomCounter
from jobs.agent.ranks import POLL_S, Rank, Ranks
from jobs.agent.signals import Signals
from jobs.blame import Failure
from jobs.errors import JobFailed, MeshrunError, TopologyError
from jobs.job import Job
from jobs.rank.identity import RankInfo, rank_env
from jobs.run_dir import Attempt, RunDirectory, read_json, write_json
from jobs.spec import JobSpec
from workloads.errors import first_few
from workloads.steps.board import Board

log = logging.getLogger(__name__)

SAY_EVERY_S = 1.0
STATUS_EVERY_S = 2.0
RECORDS_WITHIN_S = 2.0
"""Seconds in which a failure that another agent has left before the hosts had met must be seen here."""


def main(run_dir: Path, attempt: int, signals: Signals) -> NoReturn:
    """Runs this host's part of an attempt of the job that a run directory describes, and ends this process."""
    code = _run(Job.described_in(run_dir), attempt, signals)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and signals.ended_by is not None:  # srun then tells what a scheduler did from what an agent did
        signal.signal(signals.ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), signals.ended_by)
    os._exit(code)


def _run(job: Job, number: int, signals: Signals) -> int:
    spec = job.spec
    os.environ.update(spec.rank_env)  # on Slurm the batch script exports it, and a container's image may have its own
    secret_values.know_environment(os.environ)
    handler = logging.StreamHandler()
    handler.setFormatter(secret_values.formatter("%(asctime)s [agent] %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    processes.adopt_orphans()
    info = replace(_info(spec), attempt=number)
    run_dir = RunDirectory(spec.run_dir)
    attempt = run_dir.attempt(number).make()
    if info.rank == 0:
        run_dir.show_newest()
    agent = _Agent(job, info, attempt, signals)
    try:
        return agent.run()
    except KeeperFailed as error:
        return _without_the_others(agent, error.failure)
    except (MeshrunError, OSError) as error:
        failure = blame.failure_of(error, info.rank, info.host, time.time(), str(attempt.agent_log(info.rank)))
        return _without_the_others(agent, failure)
    finally:
        agent.end()
        if spec.executor == "local":  # a Slurm job may come back; its batch script sees the end
            run_dir.forget_secrets()


def _info(spec: JobSpec) -> RankInfo:
    """This agent's place among the agents."""
    if spec.executor == "slurm":
        return replace(RankInfo.from_env(os.environ, processes.ancestry()), noun="agent")
    return RankInfo("local", 0, 1, 0, 1, "host0", str(os.getpid()), noun="agent")


class _ToldToEnd(Exception):
    """The job is to end before its ranks have started."""


@dataclass
class _Agent:
    job: Job
    info: RankInfo
    attempt: Attempt
    signals: Signals

    def __post_init__(self) -> None:
        self.spec = self.job.spec
        self.run_dir = RunDirectory(self.spec.run_dir)
        self.on_slurm = self.spec.executor == "slurm"
        self.started = time.time()
        self.leader: Leader | None = None
        self.links: dict[int, Link] = {}
        """On the leader, by the number of the host; elsewhere the one to the leader, under 0."""
        self.meeting: Gathering | Joining | None = None
        self.keeper: Keeper | None = None
        """On the leader."""
        self.feeds: feeds.Feeds | None = None
        """On the leader, once its ranks have started."""
        self._met: Met | None = None
        self.places: list[int] = []
        """The agents that have ranks, in the order of these."""
        self.ahead_s: float | None = None
        """Seconds by which this host's clock is ahead of the leader's; never too little, and by the fastest message."""
        self.can_fork = True
        self.board = Board.create(self._ranks_here)
        self.ranks = Ranks(self.job, self.attempt, self._private, (self.board.fd,))
        self.orders: list[dict[str, Any]] = []
        """From the leader, where it is in this process."""
        self.told: set[tuple[int, bool]] = set()
        self.said_told = self.said_end = False
        self.status_at = self.lease_at = 0.0
        self.code = 1

    @property
    def _ranks_here(self) -> int:
        resources = self.spec.resources
        return resources.gpus_per_node if self.on_slurm else resources.shape.world_size

    def _private(self) -> list[int]:
        descriptors = [link.fileno() for link in self.links.values()]
        descriptors += self.meeting.private if self.meeting else ()
        descriptors += self.feeds.private if self.feeds else ()
        return [*descriptors, self.signals.owner] if self.signals.owner >= 0 else descriptors

    # --- the start ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs this host's part to its end; the exit code."""
        try:
            self._begin_to_meet()  # hosts meet while this one goes on importing
            unsafe = ranks.preload(self.spec, self._check)
            gc.enable()  # jobs/entry.py has switched it off
            if unsafe is not None:
                log.warning("%s, so each rank is an interpreter of its own; starting takes longer", unsafe)
            self.can_fork = unsafe is None
            self._meet()
            self._start()
        except _ToldToEnd:
            return self._ended_early()
        self._watch()
        return self.code

    def _check(self) -> None:
        if self.signals.look() is not None:
            raise _ToldToEnd
        if self._met is None and self.meeting is not None:
            self._met = self.meeting.look()

    @property
    def met(self) -> Met:
        """What this agent knows of the others, from the moment that all have met."""
        assert self._met is not None
        return self._met

    def _begin_to_meet(self) -> None:
        info, spec, attempt = self.info, self.spec, self.attempt
        if info.rank:
            self.meeting = Joining(info, spec, attempt)
        else:
            # The keeper has a connection to every rank, and the leader has one to every other agent.
            processes.allow_open_files(spec.resources.shape.world_size, info.host)
            self.meeting = Gathering(info, spec, attempt, str(attempt.agent_log(info.rank)))
            self.keeper = self.meeting.keeper

    def _meet(self) -> None:
        """Waits for the others; this agent is then the leader, or has a link to it."""
        assert self.meeting is not None
        self._check()
        while self._met is None:
            self.meeting.wait(POLL_S)
            self._check()
        met, self.links = self.met, self.met.links
        expected = self.spec.resources.hosts if self.on_slurm else 1
        come = [host for host in met.hosts if host]
        if len(set(come)) != len(come) or len(met.hosts) != expected:
            raise TopologyError(
                f"the job is for {expected} hosts with one agent each, and they were started on "
                f"{first_few(come)}; look for options of sbatch or srun that say how many tasks there are"
            )
        self.places = first_places(met.hosts, self.spec.resources.nodes)
        if self.info.rank == 0:
            self.leader = self._leader(self._hosts(met))

    def _hosts(self, met: Met | None = None) -> tuple[str, ...]:
        """The name of every host, by number; where they have not met, a name for each."""
        if self.on_slurm and met is not None:
            return met.hosts
        return tuple(f"host{n}" for n in range(self.spec.resources.hosts))

    def _leader(self, hosts: tuple[str, ...]) -> Leader:
        return Leader(
            self.spec, self.run_dir, self.attempt, hosts, self.info.world_size, self._order, self.on_slurm, self.started
        )  # fmt: skip

    def _start(self) -> None:
        """Starts this host's ranks; a spare host has none."""
        if self.info.rank not in self.places:
            log.info("a spare host, without ranks in attempt %d", self.attempt.number)
            return
        met, per_node, hosts = self.met, self.spec.resources.gpus_per_node, self._hosts(self.met)
        if self.on_slurm:
            hosts = tuple(hosts[number] for number in self.places)
        first = self.places.index(self.info.rank) * per_node
        cpus, how = binding.plan(os.environ, self._ranks_here, self.spec.cpu_binding)
        log.info("%s", how)
        for index in range(self._ranks_here):
            env = rank_env(first + index, hosts, per_node, self.info, met.address, met.port, self.spec.max_restarts)
            self.ranks.start({**env, **self.board.variables(index)}, cpus[index] if cpus else None, self.can_fork)
        count, took_s = len(self.ranks.all), time.time() - self.started
        log.info(
            "ranks started: %d (%d to %d on %s), after %.2f s", count, first, first + count - 1, self.info.host, took_s
        )
        if self.leader is not None:
            self.feeds = self.feeds or feeds.Feeds(self.spec)
            self.feeds.begin(self.attempt.number)

    def _end_attempt(self) -> None:
        """Ends this host's ranks, to start others; whatever is known of them is forgotten."""
        self.ranks.end(but=self._kept(), at_once=True)
        for rank in self.ranks.all:
            rank.close()  # a process that has left the rank's session may still hold the other end
        self.ranks = replace(self.ranks, all=[], oom=OomCounter())
        self.told.clear()
        self._say({"ready": True})

    def _begin_attempt(self, number: int, places: list[int]) -> None:
        """Starts this host's ranks again, as those of the next attempt."""
        self.started, self.places = time.time(), places
        self.attempt = self.run_dir.attempt(number).make()
        self.info = replace(self.info, attempt=number)
        self.ranks = replace(self.ranks, attempt=self.attempt)
        ranks.redirect_output(self.attempt.agent_log(self.info.rank))
        for index in range(self._ranks_here):
            self.board.slot(index).reset()  # a request to stop stands
        self._start()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Watches until the job is over and no process of this host is left."""
        say_at, silent_s, last = 0.0, 0.0, time.monotonic()
        at_most_s = max(SILENT_S, self.spec.rendezvous_timeout_s)  # until the leader, too, has imported all
        while True:
            now = time.monotonic()
            passed, last = min(now - last, 1.0), now
            self.ranks.look()
            self._report_ends()
            self._answer_signals()
            if now >= say_at:
                say_at = now + SAY_EVERY_S
                if self.feeds is not None:
                    self.feeds.look()
                self._say({**self._where(), "calm": self.ranks.calm()})
                if self.leader is not None:
                    for link in self.links.values():
                        link.send({"now": time.time()})
            if now >= self.status_at and self.leader is not None and self.keeper is not None:
                self.status_at = now + STATUS_EVERY_S
                self.keeper.write(self.leader.attempt.status, self.leader.status())
            if now >= self.lease_at and self.leader is not None and self.keeper is not None:
                self.lease_at = now + RENEW_EVERY_S
                self.keeper.renew_lease(self.leader.attempt.number)
                if (later := self.keeper.later_attempt()) > self.leader.attempt.number:
                    self.leader.supersede(later)
            heard = self._hear()
            silent_s = 0.0 if heard or self.leader is not None else silent_s + passed
            at_most_s = LEASE_S if heard else at_most_s
            if self.leader is None and (not self.links[0].is_open or silent_s > at_most_s):
                host = self.met.hosts[0]
                log.error("the leader on %s is gone or out of reach; this host's ranks are ended", host)
                self._say({"left": LEASE_S})  # should the leader go on
                if self.spec.resources.spares:
                    self._requeue()
                return
            for order in self._orders():
                if "now" in order:
                    ahead_s = time.time() - order["now"]
                    self.ahead_s = ahead_s if self.ahead_s is None else min(ahead_s, self.ahead_s)
                if order.get("look"):
                    self._say(self._where())
                if order.get("stacks"):
                    self.ranks.ask_for_stacks(order["stacks"])
                if order.get("stop"):
                    self.board.request_stop()
                if order.get("restart"):
                    self._end_attempt()
                if "start" in order:
                    self._begin_attempt(order["start"], order["places"])
                if order.get("end") and not self.said_end:
                    self.said_end, self.code = True, order["code"]
                    gently = {name: order[name] for name in ("first", "grace_s") if name in order}
                    self.ranks.end(but=self._kept(), **gently)
                    self._say({"bye": True})
            if (shown := self.ranks.stacks.answer()) is not None:
                self._say({**self._where(), **shown})
            if self.leader is not None:
                if self.keeper is not None and self.keeper.pid in self.ranks.others_ended and not self.said_end:
                    self.leader.lose(0, "lost the process that holds the store (killed, or out of memory)")
                if not self.leader.step():
                    return
            elif self.said_end:
                return
            time.sleep(POLL_S)

    def _kept(self) -> list[int]:
        """Children that stay while ranks are ended: the store, until all hosts have ended theirs, and the feeds."""
        store = [self.keeper.pid] if self.keeper is not None and self.keeper.pid is not None else []
        return [*store, *(self.feeds.pids if self.feeds is not None else ())]

    def _where(self) -> dict[str, Any]:
        """Where each rank of this host is."""
        found, save_s = [], 0.0
        for index, rank in enumerate(self.ranks.all):
            progress = self.board.read(index)
            found.append((rank.rank, progress.step, progress.phase, progress.since_s))
            save_s = max(save_s, progress.save_s)
        return {"ranks": found, "save_s": save_s}

    def _report_ends(self) -> None:
        """Tells the leader of ranks that have ended, or have said what ends them."""
        new = []
        for rank in self.ranks.all:
            failure, ended = rank.failure(), rank.exit_code is not None
            if (ended or failure) and (rank.rank, ended) not in self.told:
                self.told.add((rank.rank, ended))
                new.append(self._end_of(rank, failure))
        if new:
            self._say({**self._where(), "ended": new})

    def _end_of(self, rank: Rank, failure: Failure | None) -> dict[str, Any]:
        if failure is not None:
            when = time.time() - rank.failed_ago_s - (self.ahead_s or 0.0)
            failure = replace(failure, when=when, log=failure.log or str(rank.log))
        # The leader knows it anyway; this is for when the leader is lost. Of a host's ranks that have lost a peer, as
        # all ranks of the job may have at once, the first one says as much as the others.
        first = min((one for one in self.ranks.all if one.failed), key=lambda one: one.failed_at, default=None)
        if rank.failed is not None and failure is not None and (failure.own or rank is first):
            with contextlib.suppress(OSError):
                if not self.attempt.failure(rank.rank).exists():
                    write_json(self.attempt.failure(rank.rank), failure.to_json())
        death = rank.death()
        return {
            "rank": rank.rank,
            "ended": rank.exit_code is not None,
            "done": rank.done,
            "failure": failure and failure.to_json(),
            "ago_s": rank.failed_ago_s if failure else 0.0,
            "death": death.headline() if death else "",
            "stopped_at": rank.stopped_at,
            "peak_bytes": rank.peak_bytes,
            "left_at": rank.left_at,
        }

    def _answer_signals(self) -> None:
        if self.signals.stop is not None:
            signum, self.signals.stop = self.signals.stop, None
            self._ask_to_stop(signum)
        told = self.signals.look()
        if told is not None and not self.said_told:
            self.said_told = True
            if told == signal.SIGTERM and self.on_slurm and self.spec.grace_s:
                self._ask_to_stop(told)
            self._say({**self._where(), "told": told})
            self.status_at = 0.0  # where the ranks were is all that a cancelled job leaves

    def _ask_to_stop(self, signum: int) -> None:
        name = signal.Signals(signum).name
        what = " (the time limit is near, or a preemption)" if signum == signal.SIGUSR2 else ""
        log.warning("received %s%s: every rank is asked to stop after its step", name, what)
        self.board.request_stop()
        self._say({"asked": name})

    # --- messages -----------------------------------------------------------------------------------------------------

    def _say(self, message: dict[str, Any]) -> None:
        """To the leader."""
        if self.leader is not None:
            self.leader.hear(0, message)
        else:
            self.links[0].send(message)

    def _order(self, host: int, message: dict[str, Any]) -> None:
        """From the leader."""
        if host == 0:
            self.orders.append(message)
        elif host in self.links:
            self.links[host].send(message)

    def _orders(self) -> list[dict[str, Any]]:
        orders, self.orders = self.orders, []
        return orders

    def _hear(self) -> bool:
        """Takes in what has come over the network; whether anything has."""
        if self.leader is None:
            messages = self.links[0].receive()
            self.orders += messages
            return bool(messages)
        for host, link in self.links.items():
            for message in link.receive():
                self.leader.hear(host, message)
            if not link.is_open:
                self.leader.lose(host)
        return True

    # --- the end ------------------------------------------------------------------------------------------------------

    def _requeue(self) -> None:
        """Sees to it that the job does not stay without its first host."""
        from jobs.agent.abandoned import requeue_without

        self.ranks.end(but=(), at_once=True)
        store = (self.met.address, self.met.port)
        requeue_without(self.met.hosts[0], store, os.environ, lambda: self.signals.look() is not None)

    def _ended_early(self) -> int:
        """Told to end before the ranks were started."""
        told = self.signals.look()
        assert told is not None
        if not self.on_slurm:
            self.leader = self._leader(self._hosts())
            self.leader.hear(0, {"told": told})
            self.leader.step()
        elif self.info.rank == 0:
            failure = _told_by_others(self.attempt)
            if failure is not None:
                return _without_the_others(self, failure)
        return 1

    def end(self) -> None:
        """Leaves no process behind."""
        self.ranks.end(but=self.feeds.pids if self.feeds is not None else ())
        if self.feeds is not None:
            self._end_feeds(self.feeds)
        if self.keeper is not None:
            self.keeper.end()
        processes.kill_children()
        if self.leader is not None and self.keeper is not None:
            with contextlib.suppress(OSError):
                Lease.of(self.spec, self.info).release(self.leader.attempt.number)
        if self.leader is not None and self.leader.error:
            # A line more finds room on a disk that has none for a result.
            line = secret_values.without_secrets(self.leader.error)
            print(f"{JobFailed.__module__}.{JobFailed.__name__}: {line}", file=sys.stderr, flush=True)

    def _end_feeds(self, all_feeds: feeds.Feeds) -> None:
        """Lets them pass on what is left; the result tells of those that have not."""
        warnings = all_feeds.end(lambda: feeds.WITHIN_S if self.signals.ended_by is None else feeds.AT_ONCE_S)
        number = self.leader.attempt.number if self.leader is not None else self.attempt.number
        for warning in warnings:
            log.warning("%s", warning)
        with contextlib.suppress(OSError):
            if warnings and (record := self.run_dir.recorded(number)) is not None:
                record["warnings"] = [*record.get("warnings", ()), *warnings]
                self.run_dir.amend(number, record)


def _told_by_others(attempt: Attempt) -> Failure | None:
    """What another agent has left that failed before the hosts had met."""
    deadline = time.monotonic() + RECORDS_WITHIN_S
    while time.monotonic() < deadline:
        found = [
            failure
            for rank in attempt.failed()
            if (failure := Failure.from_json(read_json(attempt.failure(rank)))) is not None
        ]
        if found:
            return blame.blame(found)
        time.sleep(0.1)
    return None


def _without_the_others(agent: _Agent, failure: Failure) -> int:
    """Leaves the failure of an agent whose ranks have never started."""
    spec, info = agent.spec, agent.info
    log.error("%s", failure.message)
    if info.rank >= spec.resources.nodes:  # a spare host; the others wait for it, and then do without it
        return 1
    number = info.rank * spec.resources.gpus_per_node
    failure = replace(failure, rank=number)
    with contextlib.suppress(OSError):
        write_json(agent.attempt.failure(number), failure.to_json())
    if info.rank == 0:
        other = _told_by_others(agent.attempt) if not failure.own else None
        cause = blame.blame([failure, other]) if other else failure
        agent.leader = agent._leader(agent._hosts())
        agent.leader.fail(cause, "its ranks had not started")
    return 1
