"""The result of a Slurm job whose leader left none: from Slurm's state, srun's log and what agents left.

The leader knows how every rank ended, and leaves the result itself. It cannot where Slurm ended the job (its time was
up, a host failed, somebody cancelled it), where it or another agent was killed or could not start, and where the run
directory cannot be written to. Then the batch script asks here (`jobs/entry.py --ended`), and so does whoever follows
the job where the script could not, either. Both come to the same record, since both read the same files.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import blame
from jobs.blame import Failure
from jobs.errors import JobFailed
from jobs.run_dir import BY_ITSELF, RunDirectory, end_of, open_regular, read_json
from jobs.slurm import environment, query, srun
from jobs.slurm.query import JobState
from jobs.slurm.srun import AgentEnd, SrunLog
from jobs.status import in_words
from workloads.errors import first_few

_ASKS_TO_END = {
    signal.SIGTERM: "preemption, or someone's kill",
    signal.SIGINT: "someone's scancel --signal=INT, or kill -INT",
}
"""The signals by which an agent ends its ranks and then itself, and whose they are."""

# --- who or what ended it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Everything that is known about one attempt's end."""

    workload: str
    attempt: int
    job_id: str
    gpus_per_node: int
    now: float
    """Seconds since the epoch."""
    failures: Sequence[Failure] = ()
    """What agents have left on disk: of their ranks, and of themselves."""
    srun: SrunLog = field(default_factory=SrunLog)
    status: int | None = None
    """srun's exit code, where it is known."""
    state: JobState | None = None
    """What Slurm says of the job, where it was asked."""
    down_hosts: tuple[str, ...] = ()
    """Those of its hosts that Slurm has lost, where it was asked."""
    time_min: int | None = None
    logs: Mapping[int, str] = field(default_factory=dict)
    """The log of each host's agent, by the host's number."""
    last_lines: Mapping[int, str] = field(default_factory=dict)
    """The error that the log of an agent ends with, of those that ended first."""
    leader_says: str = ""
    """The root cause, where the leader could write it nowhere but into its log."""
    ranks_were: str = ""
    """Where its ranks were, as the leader last said."""
    script_says: str = ""
    """The end of slurm.log, for a job that never came to srun."""
    srun_began: bool = False
    srun_log: str = ""
    slurm_log: str = ""
    slurm_log_exists: bool = True
    fault: str = ""
    """Why the run directory cannot be written to, where it cannot."""

    @property
    def says_nothing(self) -> bool:
        """Whether no agent, nor srun, nor Slurm has left a word on how it ended."""
        log = self.srun
        return not (self.failures or self.leader_says or log.ends or log.cause or log.complaint or self.state)

    @property
    def cause(self) -> str:
        """The state of Slurm's that says that Slurm ended the job, or nothing."""
        state = self.state.state if self.state else ""
        if state in ("TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"):
            return state
        if self.state is not None and self.state.preempted and self.srun.cause in ("", "CANCELLED", "STEP_ENDED"):
            return "PREEMPTED"
        return self.srun.cause

    @property
    def asked_to_end(self) -> AgentEnd | None:
        """The first agent that ended because a signal asked it to; srun then ends the others."""
        return next((end for end in self.srun.first_ends if -end.code in _ASKS_TO_END), None)

    def is_cascading(self, failure: Failure) -> bool:
        """Whether a failure only follows from the end of the whole job; otherwise the leader would have recorded it."""
        if not (self.cause or self.asked_to_end):
            return False
        end = self.srun.end_on(failure.host)
        return failure.kind == "killed" if end is None else end.cascading or -end.code in _ASKS_TO_END

    def of_agent(self, end: AgentEnd) -> Failure:
        """An agent's own failure, which stands for its first rank's."""
        rank, log = end.number * self.gpus_per_node, self.logs.get(end.number, "")
        said = self.last_lines.get(end.number, "")
        failure = blame.failure_of_agent(end.code, rank, end.host, self.now, log, said)
        if end.code < 0 and (end.out_of_memory or (self.state and self.state.state == "OUT_OF_MEMORY")):
            return replace(failure, message=blame.OUT_OF_MEMORY)
        return failure


def outcome(evidence: Evidence) -> dict[str, Any]:
    """The record of a job that failed: whom to name, or what Slurm did. Pure.

    In this order: what the leader found; an agent that was killed, for whatever its loss has brought about; a rank's
    own failure; what Slurm did; an agent that ended by itself; the first rank that lost a peer; srun's complaint.
    """
    failure, error = _killed_agent(evidence) or _own_failure(evidence), evidence.leader_says
    if error:
        failure = None
    elif failure is None:
        error = _what_slurm_did(evidence) or _agent_that_ended(evidence)
        if not error and evidence.failures:
            failure = blame.blame(evidence.failures)
    return {
        "status": "failed",
        "workload": evidence.workload,
        "attempt": evidence.attempt,
        "job_id": evidence.job_id,
        # While the script is still there Slurm calls the job RUNNING or COMPLETING, which is no word on its end.
        "slurm_state": evidence.state.state if evidence.state and evidence.state.ended else None,
        "error": error or (failure.headline() if failure else _without_an_agent(evidence)),
        "traceback": failure.traceback if failure else "",
        "failure": failure.to_json() if failure else None,
    }


def _killed_agent(evidence: Evidence) -> Failure | None:
    killed = [end for end in evidence.srun.first_ends if end.code < 0 and -end.code not in _ASKS_TO_END]
    return evidence.of_agent(killed[0]) if killed else None


def _own_failure(evidence: Evidence) -> Failure | None:
    own = [failure for failure in evidence.failures if failure.own and not evidence.is_cascading(failure)]
    return blame.blame(own) if own else None


def _what_slurm_did(evidence: Evidence) -> str:
    job, cause = f"job {evidence.job_id}", evidence.cause
    at = f"; {evidence.ranks_were}" if evidence.ranks_were else ""
    if cause == "TIMEOUT":
        limit = f" of {evidence.time_min} min" if evidence.time_min else ""
        return f"{job} reached its time limit{limit}; ask for more with --time{at}"
    if cause == "CANCELLED":
        by = f" by {_user(evidence.state.by)}" if evidence.state and evidence.state.by else ""
        never = evidence.state is not None and not evidence.srun.ends and not evidence.logs
        return f"{job} was cancelled{by}" + (" before it started" if never else at)
    if cause == "STEP_ENDED" and evidence.status is None:
        return f"the batch script of {job} was killed (someone's kill, or its host's memory was used up){at}"
    if cause == "STEP_ENDED":
        return f"srun of {job} was told to end (someone's kill, or a scancel of the step alone){at}"
    if cause == "PREEMPTED":
        return f"{job} was preempted by Slurm{at}"
    if cause == "NODE_FAIL":
        which = first_few(evidence.srun.lost_hosts or evidence.down_hosts)
        return (f"{which} failed, and {job} with it" if which else f"a host of {job} failed") + at
    if cause == "BOOT_FAIL":
        return f"a host of {job} did not start"
    if cause == "DEADLINE":
        return f"{job} could not end before its deadline"
    if cause == "OUT_OF_MEMORY":
        return f"{job} used more memory than it asked for; see mem_gb_per_gpu in the cluster config{at}"
    if evidence.asked_to_end is not None:
        signum = signal.Signals(-evidence.asked_to_end.code)
        return f"{job} received {signum.name} on {evidence.asked_to_end.host} ({_ASKS_TO_END[signum]}){at}"
    return ""


def _user(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (ValueError, KeyError, OverflowError):
        return f"user {uid}"


def _agent_that_ended(evidence: Evidence) -> str:
    """One line about the first agent that ended by itself without a record; empty if there is none.

    Code 1 is that of every agent whose job has failed; another one says more.
    """
    ends = evidence.srun.first_ends
    if not ends or (evidence.fault and {end.code for end in ends} == {1}):
        return ""
    return evidence.of_agent(next((end for end in ends if end.code != 1), ends[0])).headline()


def _without_an_agent(evidence: Evidence) -> str:
    """One line for a job of which no agent has left anything."""
    job = f"job {evidence.job_id}"
    if evidence.srun.complaint:
        code = f" with code {evidence.status}" if evidence.status is not None else ""
        return f"{job}: srun ended{code}: {evidence.srun.complaint} (log: {evidence.srun_log})"
    state = f" ({evidence.state.state})" if evidence.state else ""
    if evidence.fault and evidence.slurm_log_exists:
        return f"{job} ended{state}, and no agent could say how: {evidence.fault} (log: {evidence.srun_log})"
    if not evidence.logs and not evidence.srun_began:
        if not evidence.slurm_log_exists:
            return (
                f"{job} ended{state}, and its first host could not write {evidence.slurm_log}; is the run directory "
                "still there, and on a file system that every host sees (--run-dir)?"
            )
        last_words = f"; its last words: {evidence.script_says}" if evidence.script_says else ""
        return f"{job} ended{state} before any rank was started{last_words} (log: {evidence.slurm_log})"
    if evidence.status == 0 or (evidence.state is not None and evidence.state.state == "COMPLETED"):
        log = evidence.logs.get(0, evidence.srun_log)
        return f"{job}: every rank finished its work, but none left a result (log: {log})"
    if evidence.status is not None:
        number = evidence.status - 128
        name = f" ({signal.Signals(number).name})" if number in signal.valid_signals() and number > 0 else ""
        return (
            f"{job}: srun ended with code {evidence.status}{name} and no agent gave a reason (log: {evidence.srun_log})"
        )
    were = f"; {evidence.ranks_were}" if evidence.ranks_were else ""
    return f"{job} ended{state}, and no agent left a result or a reason{were} (log: {evidence.srun_log})"


# --- gathering --------------------------------------------------------------------------------------------------------

_AT_MOST_BYTES = 1_000_000
_LOGS = 8
"""The most logs of agents that are looked into."""


def gather(
    run: RunDirectory,
    attempt: int,
    *,
    status: int | None = None,
    state: JobState | None = None,
    down_hosts: tuple[str, ...] = (),
) -> Evidence:
    """Reads what an attempt has left on disk.

    Args:
        run: the run directory.
        attempt: which incarnation.
        status: srun's exit code, where it is known.
        state: what Slurm says, where it was asked.
        down_hosts: those of the job's hosts that Slurm has lost, where it was asked.
    """
    job = read_json(run.job) or {}
    resources = job["resources"] if isinstance(job.get("resources"), dict) else {}
    per_node = resources.get("gpus_per_node")
    there = run.attempt(attempt)
    log = srun.with_the_reason(srun.read(_text(there.srun_log)), _text(run.slurm_log))
    failures = [Failure.from_json(read_json(there.failure(rank))) for rank in sorted(there.failed())]
    ended_first = [end.number for end in log.first_ends][:_LOGS]
    submitted = run.submitted()
    leaders_log = end_of(there.agent_log(0), 10_000)
    _, is_said, leader_says = leaders_log.rpartition(f"{JobFailed.__module__}.{JobFailed.__name__}: ")
    return Evidence(
        workload=str(job.get("workload", "")),
        attempt=attempt,
        job_id=submitted.job_id if submitted else os.environ.get("SLURM_JOB_ID", ""),
        gpus_per_node=per_node if isinstance(per_node, int) else 1,
        now=time.time(),
        failures=tuple(failure for failure in failures if failure is not None),
        srun=log,
        status=status,
        state=state,
        down_hosts=down_hosts,
        time_min=resources.get("time_min"),
        logs=there.agent_logs(),
        last_lines={n: line for n in ended_first if (line := blame.error_at_end(end_of(there.agent_log(n), 10_000)))},
        leader_says=leader_says.partition("\n")[0] if is_said else "",
        ranks_were=in_words(read_json(there.status)),
        script_says=_last_line(run.slurm_log),
        srun_began=there.srun_log.exists(),
        srun_log=str(there.srun_log),
        slurm_log=str(run.slurm_log),
        slurm_log_exists=run.slurm_log.exists(),
        fault=run.fault(),
    )


def _text(path: Path) -> str:
    """A log's text; of a very long one, its beginning."""
    try:
        with open_regular(path) as file:
            return file.read(_AT_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _last_line(path: Path) -> str:
    lines = end_of(path, 10_000).splitlines()
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")


def conclude(run: RunDirectory, evidence: Evidence) -> dict[str, Any]:
    """Writes the record, unless one that counts more is there already; returns the one that counts."""
    record = outcome(evidence)
    with contextlib.suppress(OSError):
        return run.publish(record)
    return record


# --- in the batch script ----------------------------------------------------------------------------------------------

_ASK_WITHIN_S = 5.0
_GRACE_AT_MOST_S = 3600.0
"""Seconds that a preempted job waits for Slurm to end it; a grace time is minutes."""


def ended(run_dir: str, attempt: str, status: str, *, sleep: Callable[[float], None] = time.sleep) -> str:
    """What the batch script runs when it ends and srun has failed, was not reached or left no result: sees to one.

    A preempted job does not come back from here: Slurm ends the script, and what it would have left is no failure.

    Args:
        run_dir: the run directory.
        attempt: the script's incarnation.
        status: the script's exit code, which is srun's where that was reached.
        sleep: waits; for tests.

    Returns:
        One line for the script's log.
    """
    run, number, env = RunDirectory(Path(run_dir)), int(attempt), os.environ
    record = run.recorded(number)
    if record is None:
        evidence = gather(run, number, status=int(status))
        if _may_be_preempted(evidence):
            answer = query.ask_scontrol(
                env.get("SLURM_JOB_ID", evidence.job_id), environment.for_queries(env), within_s=_ASK_WITHIN_S
            )
            evidence = replace(evidence, state=answer if isinstance(answer, JobState) else None)
            if evidence.state is not None and evidence.state.preempted:
                # A script that ends within the grace time has failed, and Slurm does not start it again.
                line = "meshrun: preempted; waiting for Slurm to put the job back into the queue"
                print(line, file=sys.stderr, flush=True)
                sleep(_GRACE_AT_MOST_S)
        record = conclude(run, evidence)
    if record["status"] in BY_ITSELF:
        return f"meshrun: attempt {number}: the work is {record['status']}, and srun ended with code {status} after it"
    return f"meshrun: attempt {number} failed: {record.get('error', '')}"


def _may_be_preempted(evidence: Evidence) -> bool:
    """Whether SIGTERM ended it, as at the start of a preemption's grace time; only Slurm knows whether it was one."""
    if evidence.srun.cause:
        return evidence.srun.cause in ("CANCELLED", "STEP_ENDED")
    codes = [end.code for end in evidence.srun.first_ends]
    return -signal.SIGTERM in codes if evidence.srun.ends else evidence.status == 128 + signal.SIGTERM
