"""The ranks of one host as processes: started, seen to end, and ended together. Runs in the agent."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs import blame, processes, secret_values
from jobs.agent.memory import OomCounter
from jobs.agent.signals import OF_AN_AGENT
from jobs.agent.stacks import Stacks
from jobs.blame import Failure
from jobs.frames import place_in
from jobs.job import Job
from jobs.rank import report
from jobs.run_dir import Attempt, end_of, read_json
from jobs.spec import JobSpec
from workloads import registry

log = logging.getLogger(__name__)

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.device_mesh",
    "jobs.rank.devices",
    "jobs.rank.mesh",
    "jobs.rank.rendezvous",
)
"""What every rank imports anyway; importing it starts no thread and touches no device."""
RESUMABLE = ("workloads.training.checkpoint", "torch._dynamo")
"""What ranks import to save and load their state, and with their first optimizer."""
TERM_S = 0.3
"""Between SIGTERM and SIGKILL."""
POLL_S = 0.02
_IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and `scancel --signal` send a signal to every process of the job; these are for the agents alone."""


def preload(spec: JobSpec, check: Callable[[], None]) -> str | None:
    """Imports what every rank needs, once.

    Args:
        spec: the job.
        check: called after each import, which may take long; may raise.

    Returns:
        Why ranks cannot be forked from this process; None where they can.
    """
    if sys.platform != "linux":
        return processes.why_not_fork()
    # A user's own module is imported by the ranks alone; but those that are restarted shall not import torch's again.
    is_built_in = spec.workload in registry.BUILT_IN
    more = registry.load(spec.workload).preload if is_built_in else RESUMABLE if spec.max_restarts else ()
    for module in (*PRELOAD, *more):
        with contextlib.suppress(Exception):  # of what is missing or broken, the ranks will say it
            importlib.import_module(module)
        check()
    gc.freeze()  # keeps the collector from writing to, and so copying, the pages that the ranks share
    return processes.why_not_fork()


@dataclass
class Rank:
    """One rank, from its start to its end."""

    rank: int
    host: str
    log: Path
    pid: int
    _pipe: int
    """The read end of the pipe for its records."""
    exit_code: int | None = None
    """As subprocess has it; None while it runs."""
    ended: float = 0.0
    """By time.monotonic."""
    done: bool = False
    """Whether it has said that its work is done."""
    stopped_at: int | None = None
    """The step after which a script has said that it stopped because it was asked to."""
    peak_bytes: int | None = None
    """The most memory that it has held, as it has said when its work was done."""
    failed: Failure | None = None
    """What it has said of its own failure."""
    failed_at: float = 0.0
    """When that was, by time.monotonic, which a host's processes share; its other clock may be wrong."""
    out_of_memory: bool = False
    """Whether the kernel has killed a process of this job's for its memory by the time that this one was killed."""
    _text: bytes = b""
    _call: str = ""
    """The stack of its call of os._exit or, in a script, of sys.exit."""

    def read(self) -> None:
        """Takes in what it has said."""
        while self._pipe >= 0 and processes.is_readable(self._pipe):
            data = os.read(self._pipe, 1 << 16)
            if not data:
                self.close()
                break
            self._text += data
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError, RecursionError):  # what a user's code wrote there
                record = json.loads(line)
                if record.get("done") is True:
                    self.done, self.stopped_at = True, record.get("stopped_at")
                    self.peak_bytes = record.get("peak_bytes")
                self._call = str(record.get("leaves", self._call))
                failure, at = Failure.from_json(record.get("failure")), record.get("at")
                if self.failed is None and failure is not None:
                    self.failed, self.failed_at = failure, at if isinstance(at, float) else time.monotonic()

    def close(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    @property
    def failed_ago_s(self) -> float:
        """Seconds since what ended it."""
        return max(0.0, time.monotonic() - (self.failed_at or self.ended))

    @property
    def left_at(self) -> str:
        """Where it called os._exit, or said that it ends; empty if it did not."""
        return place_in(self._call)

    def failure(self) -> Failure | None:
        """What ended it, or will, if that was not the end of its work; for when, see `failed_ago_s`."""
        if self.failed is not None:
            return self.failed
        if self.exit_code is None or self.done:
            return None
        return self._of_its_end(is_done=False)

    def death(self) -> Failure | None:
        """How it died after its work was done; None where it ended well."""
        return self._of_its_end(is_done=True) if self.done and self.exit_code else None

    def _of_its_end(self, is_done: bool) -> Failure:
        assert self.exit_code is not None
        when = time.time() - self.failed_ago_s
        said = end_of(self.log, 100_000) if self.exit_code not in (0, -signal.SIGKILL) else ""
        failure = blame.failure_of_exit(
            self.exit_code, self.rank, self.host, when, str(self.log), said, is_done=is_done, call=self._call
        )
        if self.out_of_memory:
            return replace(failure, message=blame.OUT_OF_MEMORY)
        return failure


@dataclass
class Ranks:
    """All ranks of this agent.

    Args:
        job: the job.
        attempt: where their logs go.
        private: descriptors of the agent's that no rank may hold open.
        shared: descriptors that ranks use, too.
    """

    job: Job
    attempt: Attempt
    private: Callable[[], Iterable[int]]
    shared: Sequence[int] = ()
    all: list[Rank] = field(default_factory=list)
    oom: OomCounter = field(default_factory=OomCounter)
    stacks: Stacks = field(default_factory=Stacks)
    others_ended: set[int] = field(default_factory=set)
    """Children that have ended and are no ranks."""

    def start(self, env: Mapping[str, str], cpus: set[int] | None, fork: bool) -> Rank:
        """Starts one rank with these variables added to the agent's, on these CPUs (None: those of the agent)."""
        number = int(env["RANK"])
        path = self.attempt.log(number)
        read_end, write_end = os.pipe()
        env = {**env, report.VARIABLE: report.variable(write_end), **self.stacks.open(number)}
        pid = (
            self._fork(env, path, cpus) if fork else self._spawn(env, path, cpus, (write_end, self.stacks.file(number)))
        )
        os.close(write_end)
        with contextlib.suppress(OSError):  # the child does the same; whoever is first
            os.setpgid(pid, pid)
        rank = Rank(number, env["MESHRUN_NODENAME"], path, pid, read_end)
        self.all.append(rank)
        return rank

    def _fork(self, env: Mapping[str, str], path: Path, cpus: set[int] | None) -> int:
        agent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            processes.die_with_parent(agent)
            os.setpgid(0, 0)
            for signum in OF_AN_AGENT:
                signal.signal(signum, signal.SIG_IGN if signum in _IGNORED else signal.SIG_DFL)
            for descriptor in (
                *self.private(),
                *(rank._pipe for rank in self.all),
                *self.stacks.others(int(env["RANK"])),
            ):
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            _log_to(path)
            kept = without_launcher(os.environ)
            os.environ.clear()
            os.environ.update({**kept, **env})
            _bind(cpus)
            processes.as_rank(self.job)
            code = 0
        except BaseException as error:
            secret_values.print_error(error)
        finally:
            processes.leave(code)

    def _spawn(self, env: Mapping[str, str], path: Path, cpus: set[int] | None, pass_fds: tuple[int, ...]) -> int:
        command = [sys.executable, "-u", str(processes.ENTRY), "--rank", str(self.job.spec.run_dir), str(os.getpid())]
        if cpus is not None:
            env = {**env, "MESHRUN_CPUS": ",".join(map(str, sorted(cpus)))}
        with path.open("ab") as output:
            process = subprocess.Popen(
                command,
                env={**without_launcher(os.environ), **env},
                stdout=output,
                stderr=output,
                pass_fds=(*pass_fds, *self.shared),
            )
        process.returncode = 0  # it is waited for with the others, by number
        return process.pid

    def look(self) -> None:
        """Takes in what ranks have said, and which have ended."""
        for rank in self.all:
            rank.read()
        by_pid = {rank.pid: rank for rank in self.all}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in by_pid:  # an orphan of some rank's, adopted, or the child of the meeting
                self.others_ended.add(pid)
            else:
                rank = by_pid[pid]
                rank.read()
                rank.exit_code, rank.ended = os.waitstatus_to_exitcode(status), time.monotonic()
                if not rank.done and rank.failed is None:  # it has lost the pipe, or had nothing to say
                    rank.done = self.attempt.done(rank.rank).exists()
                    rank.failed = Failure.from_json(read_json(self.attempt.failure(rank.rank)))
                if self.job.spec.is_script and rank.exit_code == 0 and rank.failed is None:
                    rank.done = True  # by os._exit(0), or a program that it has become
                rank.out_of_memory = rank.exit_code == -signal.SIGKILL and self.oom.killed_since() > 0

    def ask_for_stacks(self, question: int) -> None:
        """Asks those that run for their stacks; what they show is `stacks.answer()`, soon."""
        self.stacks.ask(question, self._running, self.attempt)

    def calm(self) -> list[tuple[int, float]]:
        """Those whose main threads wait, or compute without waiting for anything, each with for how many seconds."""
        return self.stacks.look(self._running)

    @property
    def _running(self) -> dict[int, int]:
        return {rank.rank: rank.pid for rank in self.all if rank.exit_code is None}

    @property
    def have_ended(self) -> bool:
        return all(rank.exit_code is not None for rank in self.all)

    def end(
        self, but: Iterable[int] = (), at_once: bool = False, first: int = signal.SIGTERM, grace_s: float = TERM_S
    ) -> None:
        """Ends every process below this one but those named: ranks, what they started, and what those left behind.

        Args:
            but: processes that are left alone.
            at_once: they get no time to end by themselves.
            first: the signal that asks them to.
            grace_s: the time that they get for it.
        """
        kept = set(but)
        for signum, patience in ((first, grace_s), (signal.SIGKILL, 5.0))[at_once:]:
            deadline = time.monotonic() + patience
            for rank in self.all:
                # Each rank leads a group of its own, which its children are in unless they left it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.pid, signum)
            while time.monotonic() < deadline:
                self.look()
                processes.kill_children(but={rank.pid for rank in self.all} | kept, within_s=0.1)
                if self.have_ended and not processes.children() - kept:
                    return
                time.sleep(POLL_S)


def spawned(run_dir: Path, agent: int) -> None:
    """In a rank that is an interpreter of its own: does the rank's work; the job is what its run directory says."""
    processes.die_with_parent(agent)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    text = os.environ.pop("MESHRUN_CPUS", "")
    _bind({int(cpu) for cpu in text.split(",")} if text else None)
    job = Job.described_in(run_dir)
    secret_values.know_environment(os.environ)
    try:
        processes.as_rank(job)
    except Exception as error:
        secret_values.print_error(error)
        raise SystemExit(1) from None


def _bind(cpus: set[int] | None) -> None:
    if cpus is not None:
        with contextlib.suppress(OSError):  # a CPU was taken away since: the rank then runs where it may
            os.sched_setaffinity(0, cpus)


def redirect_output(path: Path) -> None:
    """Sends what this process prints, and those that it starts, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def _log_to(path: Path) -> None:
    """Sends what this process prints to a file, and forgets the agent's log."""
    redirect_output(path)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what the launcher of a surrounding job says; MESHRUN_DEVICE is the user's."""
    return {
        name: value
        for name, value in env.items()
        if name == "MESHRUN_DEVICE" or not name.startswith(("SUBMITIT_", "MESHRUN_"))
    }
