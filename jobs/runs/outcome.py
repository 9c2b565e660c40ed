"""The result of a Slurm job whose leader wrote none, from Slurm's state, srun's log and the agents' files.

Normally the leader writes the result, because it knows how every rank ended. It cannot do so if Slurm ended the job
(time limit, failed host, scancel), if it or another agent was killed or could not start, or if the run directory is not
writable. Then the batch script writes the result (`jobs/entry.py --ended`), and if it cannot either, `submit.py wait`
does. Both reach the same result because both read the same files.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import blame, excluded, secret_values
from jobs.blame import Failure
from jobs.errors import JobFailed
from jobs.excluded import FAILED_TWICE, NO_SPARE
from jobs.run_dir import (
    BY_ITSELF,
    PREEMPTION,
    TIME_LIMIT,
    RunDirectory,
    end_of,
    is_undecided,
    open_regular,
    read_json,
    write_json,
)
from jobs.slurm import environment, query, srun
from jobs.slurm.query import JobState
from jobs.slurm.srun import AgentEnd, SrunLog
from jobs.status import in_words
from workloads.errors import first_few

_STOP_SIGNALS = {
    signal.SIGTERM: "preemption, or someone's kill",
    signal.SIGINT: "someone's scancel --signal=INT, or kill -INT",
}
"""The signals on which an agent ends its ranks and then itself, with their usual senders."""

NEVER = "a run that it was to start after has failed"


# --- the root cause --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Everything that is known about how one attempt ended."""

    workload: str
    attempt: int
    job_id: str
    gpus_per_node: int
    now: float
    """Seconds since the epoch."""
    failures: Sequence[Failure] = ()
    """The failures of ranks and agents that agents wrote to disk."""
    srun: SrunLog = field(default_factory=SrunLog)
    status: int | None = None
    """srun's exit code, if known."""
    state: JobState | None = None
    """The job's state in Slurm, if it was asked."""
    down_hosts: tuple[str, ...] = ()
    """The job's hosts that are down according to Slurm, if it was asked."""
    time_min: int | None = None
    logs: Mapping[int, str] = field(default_factory=dict)
    """The log of each host's agent, by host number."""
    last_lines: Mapping[int, str] = field(default_factory=dict)
    """The error at the end of an agent's log, by host number, for the agents that failed first."""
    leader_error: str = ""
    """The root cause, if the leader could write it only to its log."""
    last_progress: str = ""
    """Where the ranks were, as the leader last reported."""
    last_script_line: str = ""
    """The last line of slurm.log, for a job that ended before srun started."""
    srun_began: bool = False
    srun_log: str = ""
    slurm_log: str = ""
    slurm_log_exists: bool = True
    fault: str = ""
    """Why the run directory is not writable; empty if it is."""

    @property
    def is_empty(self) -> bool:
        """Whether neither an agent nor srun nor Slurm reported how the attempt ended."""
        log = self.srun
        return not (self.failures or self.leader_error or log.ends or log.cause or log.complaint or self.state)

    @property
    def cause(self) -> str:
        """The Slurm state in which Slurm itself ended the job; empty if it did not."""
        state = self.state.state if self.state else ""
        if state in ("TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"):
            return state
        if self.state is not None and self.state.preempted and self.srun.cause in ("", "CANCELLED", "STEP_ENDED"):
            return "PREEMPTED"
        return self.srun.cause

    @property
    def stopped_agent(self) -> AgentEnd | None:
        """The first agent that ended because of a stop signal; srun then ends the others."""
        return next((end for end in self.srun.first_ends if -end.code in _STOP_SIGNALS), None)

    def is_cascading(self, failure: Failure) -> bool:
        """Whether a failure only followed from the end of the whole job; otherwise the leader would have named it."""
        if not (self.cause or self.stopped_agent):
            return False
        end = self.srun.end_on(failure.host)
        return failure.kind == "killed" if end is None else end.cascading or -end.code in _STOP_SIGNALS

    def of_agent(self, end: AgentEnd) -> Failure:
        """The failure of an agent, recorded under the number of its host's first rank."""
        rank, log = end.number * self.gpus_per_node, self.logs.get(end.number, "")
        last_line = self.last_lines.get(end.number, "")
        failure = blame.failure_of_agent(end.code, rank, end.host, self.now, log, last_line)
        if end.code < 0 and (end.out_of_memory or (self.state and self.state.state == "OUT_OF_MEMORY")):
            return replace(failure, message=blame.OUT_OF_MEMORY)
        return failure


def outcome(evidence: Evidence) -> dict[str, Any]:
    """The result of a job that failed, with its root cause. Pure.

    The root cause is the first of these that exists: what the leader found; a killed agent, because its loss explains
    any later failure; a rank's own failure; what Slurm did; an agent that ended by itself; the first rank that lost a
    peer; srun's error message.
    """
    failure, error = _killed_agent(evidence) or _own_failure(evidence), evidence.leader_error
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
        # While the batch script runs, the state is RUNNING or COMPLETING, which does not say how the job ended.
        "slurm_state": evidence.state.state if evidence.state and evidence.state.ended else None,
        "error": error or (failure.headline() if failure else _without_an_agent(evidence)),
        "traceback": failure.traceback if failure else "",
        "failure": failure.to_json() if failure else None,
    }


def _killed_agent(evidence: Evidence) -> Failure | None:
    killed = [end for end in evidence.srun.first_ends if end.code < 0 and -end.code not in _STOP_SIGNALS]
    return evidence.of_agent(killed[0]) if killed else None


def _own_failure(evidence: Evidence) -> Failure | None:
    own = [failure for failure in evidence.failures if failure.own and not evidence.is_cascading(failure)]
    return blame.blame(own) if own else None


def _what_slurm_did(evidence: Evidence) -> str:
    job, cause = f"job {evidence.job_id}", evidence.cause
    at = f"; {evidence.last_progress}" if evidence.last_progress else ""
    if cause == "TIMEOUT":
        limit = f" of {evidence.time_min} min" if evidence.time_min else ""
        return f"{job} reached its time limit{limit}; ask for more with --time{at}"
    if cause == "CANCELLED":
        if evidence.state is not None and evidence.state.reason == "DependencyNeverSatisfied":
            return f"{job} was cancelled by Slurm before it started, because {NEVER}"
        by = f" by {user_of(evidence.state.by)}" if evidence.state and evidence.state.by else ""
        never = evidence.state is not None and not evidence.srun.ends and not evidence.logs
        return f"{job} was cancelled{by}" + (" before it started" if never else at)
    if cause == "STEP_ENDED" and evidence.status is None:
        return f"the batch script of {job} was killed (someone's kill, or its host ran out of memory){at}"
    if cause == "STEP_ENDED":
        return f"the srun of {job} was terminated (someone's kill, or a scancel of the step alone){at}"
    if cause == "PREEMPTED":
        return f"{job} was preempted by Slurm{at}"
    if cause == "NODE_FAIL":
        which = first_few(evidence.srun.lost_hosts or evidence.down_hosts)
        return (f"{which} failed, which ended {job}" if which else f"a host of {job} failed") + at
    if cause == "BOOT_FAIL":
        return f"a host of {job} did not start"
    if cause == "DEADLINE":
        return f"{job} could not finish before its deadline"
    if cause == "OUT_OF_MEMORY":
        return f"{job} used more memory than it requested; raise mem_gb_per_gpu in the cluster config{at}"
    agent = evidence.stopped_agent
    if agent is not None:
        signum = signal.Signals(-agent.code)
        return f"{job} received {signum.name} on {agent.host} ({_STOP_SIGNALS[signum]}){at}"
    return ""


def user_of(uid: str) -> str:
    """The name of a numeric user id."""
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (ValueError, KeyError, OverflowError):
        return f"user {uid}"


def _agent_that_ended(evidence: Evidence) -> str:
    """The headline of the first agent that ended by itself and left no record; empty if there is none.

    Every agent of a failed job exits with code 1, so an agent with another code is preferred.
    """
    ends = evidence.srun.first_ends
    if not ends or (evidence.fault and {end.code for end in ends} == {1}):
        return ""
    return evidence.of_agent(next((end for end in ends if end.code != 1), ends[0])).headline()


def _without_an_agent(evidence: Evidence) -> str:
    """The error of a job of which no agent left a record."""
    job = f"job {evidence.job_id}"
    if evidence.srun.complaint:
        code = f" with code {evidence.status}" if evidence.status is not None else ""
        return f"{job}: srun ended{code}: {evidence.srun.complaint} (log: {evidence.srun_log})"
    state = f" ({evidence.state.state})" if evidence.state else ""
    if evidence.fault and evidence.slurm_log_exists:
        return f"{job} ended{state}, and no agent could record why: {evidence.fault} (log: {evidence.srun_log})"
    if not evidence.logs and not evidence.srun_began:
        if not evidence.slurm_log_exists:
            return (
                f"{job} ended{state}, and its first host could not write {evidence.slurm_log}; make sure that the run "
                "directory still exists, and that it is on a file system that every host mounts (--run-dir)"
            )
        last_line = f"; its last output: {evidence.last_script_line}" if evidence.last_script_line else ""
        return f"{job} ended{state} before any rank was started{last_line} (log: {evidence.slurm_log})"
    if evidence.status == 0 or (evidence.state is not None and evidence.state.state == "COMPLETED"):
        log = evidence.logs.get(0, evidence.srun_log)
        return f"{job}: every rank finished its work, but none left a result (log: {log})"
    if evidence.status is not None:
        number = evidence.status - 128
        name = f" ({signal.Signals(number).name})" if number in signal.valid_signals() and number > 0 else ""
        code = f"code {evidence.status}{name}"
        return f"{job}: srun ended with {code}, and no agent left a reason (log: {evidence.srun_log})"
    at = f"; {evidence.last_progress}" if evidence.last_progress else ""
    return f"{job} ended{state}, and no agent left a result or a reason{at} (log: {evidence.srun_log})"


# --- gathering --------------------------------------------------------------------------------------------------------

_MOST_BYTES = 1_000_000
_MOST_LOGS = 8
"""How many agents' logs are read at most."""


def gather(
    run: RunDirectory,
    attempt: int,
    *,
    status: int | None = None,
    state: JobState | None = None,
    down_hosts: tuple[str, ...] = (),
    writes: bool = True,
) -> Evidence:
    """Reads an attempt's files.

    Args:
        run: the run directory.
        attempt: the attempt's number.
        status: srun's exit code, if known.
        state: the job's state in Slurm, if it was asked.
        down_hosts: the job's hosts that are down according to Slurm, if it was asked.
        writes: whether it is tried out if the run directory can be written to.
    """
    job = read_json(run.job) or {}
    resources = job["resources"] if isinstance(job.get("resources"), dict) else {}
    per_node = resources.get("gpus_per_node")
    files = run.attempt(attempt)
    log = srun.with_the_reason(srun.read(_text(files.srun_log)), _text(run.slurm_log))
    failures = [Failure.from_json(read_json(files.failure(rank))) for rank in sorted(files.failed())]
    ended_first = [end.number for end in log.first_ends][:_MOST_LOGS]
    submitted = run.submitted()
    leader_log = end_of(files.agent_log(0), 10_000)
    _, found, leader_error = leader_log.rpartition(f"{JobFailed.__module__}.{JobFailed.__name__}: ")
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
        logs=files.agent_logs(),
        last_lines={n: line for n in ended_first if (line := blame.error_at_end(end_of(files.agent_log(n), 10_000)))},
        leader_error=leader_error.partition("\n")[0] if found else "",
        last_progress=in_words(read_json(files.status)),
        last_script_line=_last_line(run.slurm_log),
        srun_began=files.srun_log.exists(),
        srun_log=str(files.srun_log),
        slurm_log=str(run.slurm_log),
        slurm_log_exists=run.slurm_log.exists(),
        fault=run.fault() if writes else "",
    )


def _text(path: Path) -> str:
    """A log's text, or the beginning of a very long one."""
    try:
        with open_regular(path) as file:
            return file.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _last_line(path: Path) -> str:
    lines = end_of(path, 10_000).splitlines()
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")


def conclude(run: RunDirectory, evidence: Evidence, *, writes: bool = True) -> dict[str, Any]:
    """Writes the result to the run directory unless it has a more informative one; returns the one that stays.

    Without `writes`, nothing is written.
    """
    record = outcome(evidence)
    if not writes:
        return record
    with contextlib.suppress(OSError):
        record = run.publish(record)
        path = run.attempt(evidence.attempt).failure_record
        if record["status"] == "failed" and not path.exists():
            write_json(path, _failure_record(record))
    return record


def _failure_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What failure.json holds where no leader was left to write it."""
    unknown = {"rank": None, "host": None, "when": None, "kind": None, "message": record.get("error", ""), "log": ""}
    cause = record.get("failure") or unknown
    return {
        "attempt": record["attempt"],
        "root_cause": {
            **cause,
            "last_lines": end_of(Path(cause["log"]), 10_000).splitlines()[-20:] if cause["log"] else [],
        },
        "decision": "the job has ended",
        "why": "no leader was left that could decide",
    }


# --- in the batch script ----------------------------------------------------------------------------------------------

_ASK_WITHIN_S = 5.0
_GRACE_AT_MOST_S = 3600.0
"""Seconds that a preempted job waits for Slurm to end it; a grace time is a few minutes."""


def ended(run_dir: str, attempt: str, status: str, *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Makes sure that an attempt has a result, or that a run that was stopped goes on; the batch script runs this.

    For a preempted job this does not return: Slurm ends the script, and a requeued attempt is not a failure.

    Args:
        run_dir: the run directory.
        attempt: the attempt's number.
        status: the script's exit code, which is srun's if srun was started.
        sleep: for tests.

    Returns:
        One line for the script's log.
    """
    run, number, env = RunDirectory(Path(run_dir)), int(attempt), os.environ
    kept = run.kept_secrets()
    secret_values.know(kept)
    line = secret_values.without_secrets(_ended(run, number, status, env, sleep))
    if kept and _is_over(run, number, env):
        run.forget_secrets()
    return line


def _is_over(run: RunDirectory, number: int, env: Mapping[str, str]) -> bool:
    """Whether the job ends for good with its batch script, as far as is certain; `submit.py wait` may know later."""
    record = run.recorded(number) or {}
    if not record or "next_attempt" in record or is_undecided(record):
        return False
    answer = query.ask_scontrol(env.get("SLURM_JOB_ID", ""), environment.for_queries(env), within_s=_ASK_WITHIN_S)
    if not isinstance(answer, JobState) or answer.preempted:
        return False
    # While Slurm ends the script of a job that it will start again, it says RUNNING or CANCELLED; the log says why.
    since = end_of(run.slurm_log, 8192).rpartition("\nmeshrun: attempt ")[2]
    cancelled = {why.strip() for why in re.findall(r" CANCELLED AT \S+(.*)\*\*\*", since)}
    if not cancelled <= {"", "DUE TO TIME LIMIT"}:
        return False
    return answer.state == "RUNNING" or bool(cancelled and answer.state in query.FINAL)


def _ended(run: RunDirectory, number: int, status: str, env: Mapping[str, str], sleep: Callable[[float], None]) -> str:
    """The line."""
    record = run.recorded(number)
    if record is None:
        evidence = gather(run, number, status=int(status))
        if _may_be_preempted(evidence):
            answer = query.ask_scontrol(
                env.get("SLURM_JOB_ID", evidence.job_id), environment.for_queries(env), within_s=_ASK_WITHIN_S
            )
            evidence = replace(evidence, state=answer if isinstance(answer, JobState) else None)
            if evidence.state is not None and evidence.state.preempted:
                _await_slurm("preempted", sleep)
        record = conclude(run, evidence)
    elif is_undecided(record) and "stopped_by" in record:
        return _go_on(run, number, record, int(status), sleep)
    if record.get("decision", "").endswith((FAILED_TWICE, NO_SPARE)):
        return _go_on_elsewhere(run, number, record)
    if record["status"] == "stopped":
        return f"meshrun: attempt {number} was stopped: {record.get('error', '')}"
    if record["status"] in BY_ITSELF:
        return f"meshrun: attempt {number}: the work is {record['status']}, but then srun ended with code {status}"
    return f"meshrun: attempt {number} failed: {record.get('error', '')}"


def _go_on(run: RunDirectory, number: int, record: dict[str, Any], status: int, sleep: Callable[[float], None]) -> str:
    """Sees to it that a run that was stopped goes on, unless it was cancelled; its record says what was decided."""
    env = environment.for_queries(os.environ)
    evidence = gather(run, number, status=status)
    job_id = os.environ.get("SLURM_JOB_ID", evidence.job_id)
    answer = query.ask_scontrol(job_id, env, within_s=_ASK_WITHIN_S)
    after = record.get("error", "").partition("by request")[2]

    def decide(decision: str, **changes: Any) -> str:
        nonlocal record
        record = {**record, "decision": decision, **changes}
        run.amend(number, record)
        return f"meshrun: attempt {number} was stopped: {record['error']}; {decision}"

    cause = replace(evidence, state=answer if isinstance(answer, JobState) else None).cause
    # Without a grace time, the job may be back in the queue by now, and only the script's log tells why.
    if cause == "PREEMPTED" or (isinstance(answer, JobState) and answer.preempted):
        line = f"by a preemption{after}"
        decide("Slurm starts it again", error=line, stopped_by=PREEMPTION, next_attempt=number + 1)
        return _await_slurm("preempted", sleep)
    if record["stopped_by"] == "SIGTERM" and cause == "CANCELLED":
        line = f"job {job_id} was cancelled{after}"
        return decide("cancelled", status="cancelled", error=line, slurm_state="CANCELLED")
    if record["stopped_by"] == "SIGTERM" and cause != "TIMEOUT":
        if isinstance(answer, JobState) and answer.state == "RUNNING" and not cause:
            return decide("not requeued: someone's SIGTERM ended it")
        return f"meshrun: attempt {number} was stopped by Slurm, which decides what becomes of the job"

    record |= {"error": f"before its time limit{after}", "stopped_by": TIME_LIMIT}
    stops = 1 + _stops_at_the_limit(run)
    at_most = (read_json(run.job) or {}).get("max_requeues", 0)
    if stops > at_most:
        return decide(f"not requeued: all requeues are used up (--max-requeues {at_most})")
    if not run.has_checkpoints():
        return decide(f"not requeued: nothing was saved in {run.checkpoints} that it could go on from")
    decide(f"requeued (requeue {stops} of {at_most})", next_attempt=number + 1)
    if problem := query.requeue(job_id, env):
        del record["next_attempt"]
        return decide(f"not requeued: {problem}")
    return _await_slurm("requeued", sleep)


def _go_on_elsewhere(run: RunDirectory, number: int, record: dict[str, Any]) -> str:
    """Requeues a run that has no spare host left, or whose host was the root cause twice (if possible, without it)."""
    env = environment.for_queries(os.environ)
    cause, job = Failure.from_json(record["failure"]), read_json(run.job) or {}
    assert cause is not None
    by_user, resources = str(job["sbatch"].get("exclude", "")), job["resources"]
    nodes = resources["nodes"] + resources.get("spares", 0)
    others = query.hosts_up(os.environ.get("SLURM_JOB_PARTITION", ""), env) - {cause.host}
    without = ""
    if record["decision"].endswith(NO_SPARE):
        what = f"{excluded.REQUEUED_WITH} other spare hosts, since none is left"
    elif len(others - set(srun.hosts_of(excluded.option(by_user, run)))) < nodes:
        what = f"{excluded.REQUEUED_WITH} {cause.host}, which was the root cause twice: too few other hosts are up"
    else:
        what = f"{excluded.REQUEUED_WITH}out {excluded.exclude(run, cause)}"
        without = excluded.option(by_user, run)

    def decide(decision: str, **changes: Any) -> str:
        run.amend(number, {**record, "error": cause.headline(), "decision": decision, **changes})
        path, hosts = run.attempt(number).failure_record, without.split(",") if without else []
        with contextlib.suppress(OSError):
            write_json(path, {**(read_json(path) or {}), "decision": decision, "excluded": hosts})
        return f"meshrun: attempt {number} failed: {cause.headline()}; {decision}"

    if excluded.requeues(run) >= job.get("max_requeues", 0):
        return decide(f"not requeued: all requeues are used up (--max-requeues {job.get('max_requeues')})")
    count = f"requeue {excluded.requeues(run) + 1} of {job.get('max_requeues')}"
    line, job_id = decide(f"{what} ({count})", next_attempt=number + 1), os.environ.get("SLURM_JOB_ID", "")
    # As it requeues the job, Slurm ends this process and its children; what must follow takes less than its KillWait.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if problem := query.requeue(job_id, env):
        return decide(f"not requeued: {problem}")
    if without and (problem := query.exclude(job_id, without, env)):
        line += f"; but Slurm does not exclude it: {problem}"
    return line


def conclude_stop(
    run: RunDirectory, evidence: Evidence, record: dict[str, Any], *, writes: bool = True
) -> dict[str, Any]:
    """What a run that was stopped came to where its batch script could not decide: by what Slurm did, if it did."""
    error = _what_slurm_did(evidence)
    if error:
        status = "cancelled" if evidence.cause == "CANCELLED" else "failed"
        state = evidence.state.state if evidence.state and evidence.state.ended else None
        record = {**record, "status": status, "error": error, "slurm_state": state}
        if writes:
            with contextlib.suppress(OSError):
                run.amend(evidence.attempt, record)
    return record


def _stops_at_the_limit(run: RunDirectory) -> int:
    """How many earlier attempts were stopped before a time limit."""
    numbers = range(run.last_attempt().number + 1)
    return sum((run.recorded(number) or {}).get("stopped_by") == TIME_LIMIT for number in numbers)


def _await_slurm(what: str, sleep: Callable[[float], None]) -> str:
    """Waits for Slurm to end this script, which must not end before: Slurm would count the job as failed."""
    print(f"meshrun: {what}; waiting for Slurm to requeue the job", file=sys.stderr, flush=True)
    sleep(_GRACE_AT_MOST_S)
    return f"meshrun: {what}, and after {_GRACE_AT_MOST_S:g} s Slurm has not ended this job"


def _may_be_preempted(evidence: Evidence) -> bool:
    """Whether SIGTERM ended the attempt, as in a preemption with a grace time. Only Slurm knows whether it was one."""
    if evidence.srun.cause:
        return evidence.srun.cause in ("CANCELLED", "STEP_ENDED")
    codes = [end.code for end in evidence.srun.first_ends]
    return -signal.SIGTERM in codes if evidence.srun.ends else evidence.status == 128 + signal.SIGTERM
