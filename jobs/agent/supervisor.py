"""The local executor: N emulated hosts on this machine, started, watched, ended and blamed as srun would.

submitit pickles the job and starts one process for it, the supervisor, which imports torch once (and does nothing
else with it) and forks the ranks: 8 ranks are there in the time that one import takes. Where forking is not safe, each
rank is an interpreter of its own, which is said and takes longer. Each rank gets the variables that a cluster would
have given it and calls the very same Job; from there on nothing is local any more.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.local import local as submitit_local

from jobs import blame, processes
from jobs.blame import Failure, LastSeen
from jobs.errors import Interrupted, JobFailed
from jobs.job import Job
from jobs.rank.identity import local_env
from jobs.run_dir import BY_ITSELF, Attempt, RunDirectory, read_json, write_json
from jobs.spec import JobSpec
from workloads import registry

log = logging.getLogger(__name__)

OWNER_FD = "MESHRUN_OWNER_FD"
"""The read end of a pipe that the waiting command line holds open: its end is the owner's."""

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.device_mesh",
    "jobs.rank.devices",
    "jobs.rank.mesh",
    "jobs.rank.rendezvous",
)
"""What every rank imports anyway; importing it starts no thread and touches no device."""

POLL_S = 0.02
SETTLE_S = 0.4
"""After a rank's own failure: for others that failed at the same moment to leave their records."""
SETTLE_LOST_PEER_S = 1.0
"""After the mere loss of a peer: for the peer itself to be seen dead."""
TERM_S = 0.3
"""Between SIGTERM and SIGKILL."""


# --- on the submitting side -------------------------------------------------------------------------------------------


class LocalExecutor(submitit_local.LocalExecutor):
    """submitit's local executor with one process, the supervisor, in place of its controller and tasks.

    Args:
        folder: for submitit's files.
        command: what starts the supervisor.
        log_file: the supervisor's stdout and stderr.
        owned: whether the job ends with this process (a waiting command line), whatever ends that.
        env: variables for the supervisor and so for every rank.
    """

    def __init__(self, folder: Path, command: list[str], log_file: Path, owned: bool, env: dict[str, str]) -> None:
        super().__init__(folder)
        self.command = command
        self.log_file = log_file
        self.owned = owned
        self.env = env

    def _submit_command(self, command: str) -> submitit_local.LocalJob[Any]:
        env = {**os.environ, **self.env, "SUBMITIT_EXECUTOR": "local"}
        pass_fds: tuple[int, ...] = ()
        if self.owned:
            read_end, self._write_end = os.pipe()  # the write end closes when this process ends, however it ends
            env[OWNER_FD] = str(read_end)
            pass_fds = (read_end,)
        self.log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            # A session of its own: the terminal's Ctrl-C and hang-up reach the command line, which decides.
            process = subprocess.Popen(
                self.command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        if self.owned:
            os.close(read_end)
        return submitit_local.LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=[0])


# --- the supervisor ---------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    rank: int
    host: str
    pid: int
    log: Path
    exit_code: int | None = None
    """As subprocess has it; None while it runs."""
    ended: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Supervisor:
    """The callable that submitit runs in the supervisor: starts every rank, watches, ends them together."""

    job: Job

    def __call__(self) -> dict[str, Any]:
        """Runs the job to its end.

        Returns:
            What result.json holds.

        Raises:
            JobFailed: some rank failed; the message and traceback are that rank's.
            Interrupted: this process was told to end, or its owner is gone.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s [supervisor] %(levelname)s: %(message)s")
        spec = self.job.spec
        run = RunDirectory(spec.run_dir)
        attempt = run.attempt(0).make()
        watch = _Watch(spec, run, attempt)
        problem = None
        try:
            watch.start(self.job)
            watch.until_all_ended()
        except (JobFailed, Interrupted) as error:
            problem = error
            failed = {
                "status": "failed" if isinstance(error, JobFailed) else "interrupted",
                "workload": spec.workload,
                "attempt": attempt.number,
                "seconds": round(time.time() - watch.started, 3),
                "error": str(error),
                "traceback": getattr(error, "traceback", ""),
                "failure": watch.blamed.to_json() if watch.blamed else None,
            }
            try:
                run.publish(failed)
            except OSError as unwritten:
                log.error("the result cannot be written: %s", unwritten)
                raise error from None
        finally:
            watch.end()
        record = read_json(run.result)
        assert record is not None
        if problem is not None and (record["status"] not in BY_ITSELF or isinstance(problem, Interrupted)):
            raise problem
        # What is done is done: what came after it is told beside it.
        warnings = [str(problem)] if problem is not None else watch.after_the_work()
        if warnings:
            record["warnings"] = warnings
            write_json(run.result, record)
        return record


class _Watch:
    """The ranks of one job, from the first fork until none is left."""

    def __init__(self, spec: JobSpec, run: RunDirectory, attempt: Attempt) -> None:
        self.spec = spec
        self.result = run.result
        self.attempt = attempt
        self.ranks: list[_Rank] = []
        self.started = time.time()
        self.signalled: int | None = None
        self.blamed: Failure | None = None
        self.owner = int(os.environ.pop(OWNER_FD, "-1"))
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        # A closed terminal is the owner's business: a job that nobody waits for runs on. submitit's handler of USR2
        # would end the job to requeue it, which nothing here could do.
        for signum in (signal.SIGHUP, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(signum, signal.SIG_IGN)
        processes.adopt_orphans()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signalled = signum

    def start(self, job: Job) -> None:
        unsafe = None if sys.platform == "linux" else f"forking is not safe on {sys.platform}"
        if unsafe is None:
            is_built_in = self.spec.workload in registry.BUILT_IN
            for module in (*PRELOAD, *(registry.load(self.spec.workload).preload if is_built_in else ())):
                with contextlib.suppress(Exception):  # of what is missing or broken, the ranks will say it
                    importlib.import_module(module)
                self._check_orders()
            threads = len(list(Path("/proc/self/task").iterdir()))
            if threads > 1:
                # A lock that another thread holds at the fork would stay held in every rank.
                unsafe = f"{threads} threads run in the supervisor after its imports"
        if unsafe is not None:
            log.warning("%s, so each rank is an interpreter of its own; starting takes longer", unsafe)
        gc.collect()
        gc.freeze()  # keeps the collector from writing to, and so copying, the pages that the ranks share
        resources = self.spec.resources
        for rank in range(resources.shape.world_size):
            env = local_env(rank, resources.nodes, resources.gpus_per_node, str(os.getpid()), self.attempt.number)
            path = self.attempt.log(rank)
            pid = self._fork(job, env, path) if unsafe is None else self._spawn(env, path)
            with contextlib.suppress(OSError):  # the child does the same; whoever is first
                os.setpgid(pid, pid)
            self.ranks.append(_Rank(rank, env["MESHRUN_NODENAME"], pid, path))
        log.info("%d ranks started after %.2f s", len(self.ranks), time.time() - self.started)

    def _fork(self, job: Job, env: dict[str, str], path: Path) -> int:
        supervisor = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            _become_rank(supervisor, env, path, self.owner)
            processes.as_rank(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            processes.leave(code)

    def _spawn(self, env: dict[str, str], path: Path) -> int:
        command = [sys.executable, "-u", str(processes.ENTRY), "--rank", str(self.spec.run_dir), str(os.getpid())]
        with path.open("ab") as output:
            process = subprocess.Popen(
                command, env={**_without_launcher(os.environ), **env}, stdout=output, stderr=output
            )
        process.returncode = 0  # it is waited for with the others, by number
        return process.pid

    def until_all_ended(self) -> None:
        """Returns when every rank has done its work.

        Raises:
            JobFailed: as soon as one has not, and the one to blame is known.
            Interrupted: told to end.
        """
        limit = self.spec.resources.time_min
        deadline = time.monotonic() + limit * 60 if limit else None
        while True:
            self._reap()
            if any(rank.exit_code is not None and self._failure(rank) for rank in self.ranks):
                self._settle()
                failures = [f for rank in self.ranks if (f := self._failure(rank))]
                self.blamed = blame.blame(failures)
                if not self.blamed.own:
                    last = {
                        rank.rank: LastSeen(rank.rank, rank.host, *(self.attempt.last_step(rank.rank) or ()))
                        for rank in self.ranks
                    }
                    running = set(last) - {failure.rank for failure in failures}
                    self.blamed = blame.root_cause(failures, last, running, self.attempt.finished())
                raise JobFailed(self.blamed.headline(), self.blamed.traceback)
            if all(rank.exit_code is not None for rank in self.ranks):
                return
            self._check_orders()
            if deadline is not None and time.monotonic() > deadline:
                raise JobFailed(f"the time limit of {limit} min was reached; ask for more with --time")
            time.sleep(POLL_S)

    def _settle(self) -> None:
        """Waits a moment for records and deaths that belong to the same event."""
        began = time.monotonic()
        while True:
            self._reap()
            failures = [f for rank in self.ranks if rank.exit_code is not None and (f := self._failure(rank))]
            enough = SETTLE_S if any(f.own for f in failures) else SETTLE_LOST_PEER_S
            if time.monotonic() - began > enough or all(rank.exit_code is not None for rank in self.ranks):
                return
            time.sleep(POLL_S)

    def _check_orders(self) -> None:
        if self.signalled is not None:
            raise Interrupted(self.signalled)
        if self.owner >= 0 and select.select([self.owner], [], [], 0)[0]:
            raise Interrupted(signal.SIGHUP)

    def _reap(self) -> None:
        by_pid = {rank.pid: rank for rank in self.ranks}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in by_pid:  # else an orphan of some rank's, adopted
                by_pid[pid].exit_code = os.waitstatus_to_exitcode(status)
                by_pid[pid].ended = time.time()

    def _failure(self, rank: _Rank) -> Failure | None:
        """What ended this rank, if it was not the end of its work."""
        failure = Failure.from_json(read_json(self.attempt.failure(rank.rank)))
        if failure is not None:
            return failure
        if rank.exit_code is None:
            return None
        # Its work is done; rank 0's is when the result is there.
        if self.attempt.done(rank.rank).exists() and (rank.rank != 0 or self.result.exists()):
            return None
        said = self.attempt.end_of_log(rank.rank) if rank.exit_code not in (0, -signal.SIGKILL) else ""
        return blame.failure_of_exit(rank.exit_code, rank.rank, rank.host, rank.ended, str(rank.log), said)

    def after_the_work(self) -> list[str]:
        """How ranks died whose work was done: warnings, one a line."""
        died = [rank for rank in self.ranks if rank.exit_code]
        return [
            blame.failure_of_exit(
                rank.exit_code or 0, rank.rank, rank.host, rank.ended, str(rank.log), is_done=True
            ).headline()
            for rank in died
        ]

    def end(self) -> None:
        """Ends every process below this one: ranks, what they started, and what those left behind."""
        for signum, patience in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + patience
            for rank in self.ranks:
                # Each rank leads a group of its own, which its children are in unless they left it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.pid, signum)
            while time.monotonic() < deadline:
                self._reap()
                processes.kill_children(but={rank.pid for rank in self.ranks}, within_s=0.1)
                if not processes.children() and all(rank.exit_code is not None for rank in self.ranks):
                    return
                time.sleep(POLL_S)


def _become_rank(supervisor: int, env: dict[str, str], path: Path, owner_fd: int) -> None:
    """In the forked child: makes it a process of its own, as if the launcher had started it afresh."""
    processes.die_with_parent(supervisor)
    os.setpgid(0, 0)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)
    if owner_fd >= 0:
        os.close(owner_fd)
    sys.stdout.flush()
    sys.stderr.flush()
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    kept = _without_launcher(os.environ)
    os.environ.clear()
    os.environ.update({**kept, **env})


def _without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what the launcher of a surrounding job says; MESHRUN_DEVICE is the user's."""
    return {
        name: value
        for name, value in env.items()
        if name == "MESHRUN_DEVICE" or not name.startswith(("SUBMITIT_", "MESHRUN_"))
    }


def spawned_rank(run_dir: Path, supervisor: int) -> None:
    """A rank that is an interpreter of its own; the job is what its run directory says."""
    processes.die_with_parent(supervisor)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    processes.as_rank(Job.described_in(run_dir))
