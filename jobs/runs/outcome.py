"""How a Slurm job ended: failures on disk, srun's words and Slurm's state -> the record in result.json.

The batch script asks when srun has failed (`jobs/entry.py --ended`), and whoever follows the job when the script itself
could not: its host died, the time was up, somebody cancelled it. Both come to the same record, since both read the
same files; what is in them decides, and what Slurm says where they hold nothing of a rank's own.

A rank that raised has left a record, with its traceback. One that was killed, or left without a word, is known only
from a line of srun's. Its peers fail with records of their own that say they lost somebody, or are ended by srun.
"""

from __future__ import annotations

import contextlib
import functools
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

from jobs import blame
from jobs.blame import Failure, LastSeen
from jobs.run_dir import BY_ITSELF, Attempt, RunDirectory, end_of, open_regular, read_json
from jobs.slurm import environment, query, srun
from jobs.slurm.query import JobState
from jobs.slurm.srun import SrunWords
from workloads.errors import first_few

# --- who or what ended it ---------------------------------------------------------------------------------------------

_SETTLED_BY_ITSELF = frozenset({-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE})
"""Signals that no peer's end brings about; an abort may be how a library answers the loss of a peer."""


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of one attempt's end."""

    workload: str
    attempt: int
    job_id: str
    world_size: int
    now: float
    """Seconds since the epoch."""
    failures: Sequence[Failure] = ()
    """What ranks have left on disk."""
    done: frozenset[int] = frozenset()
    """Ranks that finished their work."""
    words: SrunWords = field(default_factory=SrunWords)
    status: int | None = None
    """srun's exit code, where it is known."""
    state: JobState | None = None
    """What Slurm says of the job, where it was asked."""
    down_hosts: tuple[str, ...] = ()
    """Those of its hosts that Slurm has lost, where it was asked."""
    time_min: int | None = None
    hosts: tuple[str, ...] = ()
    """The host of every rank, as far as that is known without it."""
    logs: Mapping[int, str] = field(default_factory=dict)
    """The log of each rank that has one."""
    last_lines: Mapping[int, str] = field(default_factory=dict)
    """The error that a rank's log ends with, of ranks that left no record."""
    last_steps: Mapping[int, tuple[str, float]] = field(default_factory=dict)
    """The last step that a rank ended, and how many seconds ago."""
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
        """Whether no rank, nor srun, nor Slurm has left a word on how it ended."""
        return not (self.failures or self.words.ends or self.words.cause or self.words.complaint or self.state)

    @functools.cached_property
    def lost(self) -> list[Failure]:
        """Those that only lost others."""
        return [failure for failure in self.failures if not failure.own]

    @functools.cached_property
    def unnamed(self) -> list[int]:
        """The ranks that neither they themselves nor srun have said anything of, nor finished their work."""
        named = {f.rank for f in self.failures} | {end.rank for end in self.words.ends} | self.done
        return [rank for rank in range(self.world_size) if rank not in named]

    @functools.cached_property
    def running(self) -> list[int]:
        """The ranks that still ran when others had failed: srun ended them, or could not."""
        recorded = {failure.rank for failure in self.failures}
        ended = [end.rank for end in self.words.ends if end.echo and end.rank not in recorded]
        return ended + (self.unnamed if self.words.gave_up else [])

    @functools.cached_property
    def _known_hosts(self) -> dict[int, str]:
        return {**{end.rank: end.host for end in self.words.ends}, **{f.rank: f.host for f in self.failures}}

    def host_of(self, rank: int) -> str:
        if rank in self._known_hosts:
            return self._known_hosts[rank]
        return self.hosts[rank] if rank < len(self.hosts) else "a host"

    def last_of(self, rank: int) -> LastSeen:
        return LastSeen(rank, self.host_of(rank), *self.last_steps.get(rank, ("", 0.0)))

    def of_exit(self, code: int, rank: int, when: float) -> Failure:
        """The failure of a rank that has left none itself."""
        log, is_done = self.logs.get(rank, ""), rank in self.done
        failure = blame.failure_of_exit(code, rank, self.host_of(rank), when, log, is_done=is_done)
        said = f": {self.last_lines[rank]}" if code > 0 and rank in self.last_lines else ""
        return replace(failure, message=failure.message + said)


def outcome(seen: Evidence) -> dict[str, Any]:
    """The record of a job that failed: whom to blame, or what Slurm did. Pure.

    In this order: a rank's own failure; what Slurm says it did; a rank that left in silence while others waited for it;
    the first that lost a peer; whatever srun complained of.
    """
    found = _own_failure(seen)
    if found is not None:
        error, failure = found.headline(), found
    else:
        failure = None
        error = _what_slurm_did(seen)
        if not error:
            failure = _silence(seen)
            error = failure.headline() if failure else _without_a_rank(seen)
    return {
        "status": "failed",
        "workload": seen.workload,
        "attempt": seen.attempt,
        "job_id": seen.job_id,
        # While the script is still there Slurm calls the job RUNNING or COMPLETING, which is no word on its end.
        "slurm_state": seen.state.state if seen.state and seen.state.ended else None,
        "error": error,
        "traceback": failure.traceback if failure else "",
        "failure": failure.to_json() if failure else None,
    }


def _own_failure(seen: Evidence) -> Failure | None:
    """The first that failed by itself."""
    recorded = {failure.rank: failure for failure in seen.failures}
    order = {end.rank: place for place, end in enumerate(seen.words.ends)}
    own = [f for f in seen.failures if f.own]
    if _cause(seen):
        # What a rank says while Slurm ends it, such as "a worker was killed", is not what ended the job.
        own = [f for f in own if (end := seen.words.end_of(f.rank)) is None or not end.echo]
    first_own = min((order.get(f.rank, len(order)) for f in own), default=len(order))
    began, ended = min((f.when for f in own), default=seen.now), max((f.when for f in own), default=seen.now)
    for place, end in enumerate(seen.words.ends):
        if end.echo or end.rank in recorded:
            continue
        if end.code == -signal.SIGTERM and _all_were_terminated(seen):
            continue
        # srun says when only by the order of its lines. A rank that was killed before another left is the earlier
        # event, since a record is followed by the seconds that an interpreter takes to end.
        earlier = place < first_own and end.code in _SETTLED_BY_ITSELF
        failure = seen.of_exit(end.code, end.rank, (began - 1e-3) if earlier else ended + 1e-3 * (place + 1))
        if end.out_of_memory or (end.code == -signal.SIGKILL and seen.state and seen.state.state == "OUT_OF_MEMORY"):
            failure = replace(failure, message="killed by SIGKILL: its host's memory, or the job's share, was used up")
        own.append(failure)
    return blame.blame(own) if own else None


def _all_were_terminated(seen: Evidence) -> bool:
    """Whether the first SIGTERM went to several ranks at once: then it was not one rank's misfortune."""
    if seen.state is not None and seen.state.preempted:
        return True
    return sum(end.code == -signal.SIGTERM and not end.echo for end in seen.words.ends) > 1


def _cause(seen: Evidence) -> str:
    """The state of Slurm's that says that Slurm ended the job, or nothing."""
    state = seen.state.state if seen.state else ""
    if state in ("TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"):
        return state
    if seen.state is not None and seen.state.preempted and seen.words.cause in ("", "CANCELLED", "STEP_ENDED"):
        return "PREEMPTED"
    return seen.words.cause


def _what_slurm_did(seen: Evidence) -> str:
    job, cause = f"job {seen.job_id}", _cause(seen) or seen.words.later
    at = f"; rank 0 was last in step {seen.last_steps[0][0]}" if 0 in seen.last_steps else ""
    if cause == "TIMEOUT":
        limit = f" of {seen.time_min} min" if seen.time_min else ""
        return f"{job} reached its time limit{limit}; ask for more with --time{at}"
    if cause == "CANCELLED":
        by = f" by {_user(seen.state.by)}" if seen.state and seen.state.by else ""
        never = seen.state is not None and not seen.words.ends and not seen.logs
        return f"{job} was cancelled{by}" + (" before it started" if never else at)
    if cause == "STEP_ENDED" and seen.status is None:
        return f"the batch script of {job} was killed (someone's kill, or its host's memory was used up){at}"
    if cause == "STEP_ENDED":
        return f"srun of {job} was told to end (someone's kill, or a scancel of the step alone){at}"
    if cause == "PREEMPTED":
        return f"{job} was preempted by Slurm{at}"
    if cause == "NODE_FAIL":
        which = first_few(seen.words.lost_hosts or seen.down_hosts)
        return (f"{which} failed, and {job} with it" if which else f"a host of {job}'s failed") + at
    if cause == "BOOT_FAIL":
        return f"a host of {job}'s did not start"
    if cause == "DEADLINE":
        return f"{job} could not end before its deadline"
    if cause == "OUT_OF_MEMORY":
        return f"{job} used more memory than it asked for; see mem_gb_per_gpu in the cluster config{at}"
    if seen.words.ends and _all_were_terminated(seen):
        return f"every rank of {job} got a SIGTERM: Slurm's, as when it preempts with a grace time, or somebody's{at}"
    return ""


def _user(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (ValueError, KeyError, OverflowError):
        return f"user {uid}"


def _silence(seen: Evidence) -> Failure | None:
    """The failure of a job in which nobody was seen to fail: some left without a word, or only lost others."""
    unnamed = seen.unnamed
    completed = seen.state is not None and seen.state.state == "COMPLETED"
    if unnamed and (completed or (seen.status == 0 and (seen.srun_began or seen.logs))):
        return seen.of_exit(0, unnamed[0], seen.now)
    if not seen.lost:
        return None
    if unnamed and not seen.words.gave_up and (seen.words.ends or seen.status is not None):
        # srun names every rank that ended badly or that it had to end: the one that it does not name exited with 0,
        # if its log is whole. It is not if ranks that gave up are missing in it, and may not be if more than one is.
        if len(unnamed) == 1 and {failure.rank for failure in seen.failures} <= {end.rank for end in seen.words.ends}:
            return seen.of_exit(0, unnamed[0], seen.now)
        one = min(unnamed[:_UNNAMED], key=lambda rank: (seen.last_of(rank).number, rank))
        others = first_few([f"rank {rank}" for rank in unnamed if rank != one]) or "ranks that gave up on it"
        how = f"ended and gave no reason ({seen.last_of(one)}); {seen.srun_log} does not say how, nor of {others}"
        return replace(seen.of_exit(0, one, seen.now), message=how)
    ranks = (*(failure.rank for failure in seen.lost), *seen.running, *seen.done)
    return blame.root_cause(seen.lost, {rank: seen.last_of(rank) for rank in ranks}, seen.running, seen.done)


def _without_a_rank(seen: Evidence) -> str:
    """What there is to say where no rank has left anything."""
    job = f"job {seen.job_id}"
    if seen.words.complaint:
        code = f" with code {seen.status}" if seen.status is not None else ""
        return f"{job}: srun ended{code}: {seen.words.complaint} (log: {seen.srun_log})"
    state = f" ({seen.state.state})" if seen.state else ""
    if seen.fault and seen.slurm_log_exists:
        return f"{job} ended{state}, and no rank could say how: {seen.fault} (log: {seen.srun_log})"
    if not seen.logs and not seen.srun_began:
        if not seen.slurm_log_exists:
            return (
                f"{job} ended{state}, and its first host could not write {seen.slurm_log}; is the run directory still "
                "there, and on a file system that every host sees (--run-dir)?"
            )
        said = f"; its last words: {seen.script_says}" if seen.script_says else ""
        return f"{job} ended{state} before any rank was started{said} (log: {seen.slurm_log})"
    if seen.status == 0:
        log = seen.logs.get(0, seen.srun_log)
        return f"{job}: every rank finished its work, and none has left a result (log: {log})"
    if seen.status is not None:
        number = seen.status - 128
        name = f" ({signal.Signals(number).name})" if number in signal.valid_signals() and number > 0 else ""
        return f"{job}: srun ended with code {seen.status}{name} and no rank has given a reason (log: {seen.srun_log})"
    return f"{job} ended{state}, and no rank has left a result or said why (log: {seen.srun_log})"


# --- gathering --------------------------------------------------------------------------------------------------------

RECORD_WITHIN_S = 2.0
"""Seconds that another host's record of a failure may take to be seen here."""
_AT_MOST_BYTES = 1_000_000


def gather(
    run: RunDirectory,
    attempt: int,
    *,
    status: int | None = None,
    state: JobState | None = None,
    down_hosts: tuple[str, ...] = (),
    nodelist: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> Evidence:
    """Reads what an attempt has left on disk.

    Args:
        run: the run directory.
        attempt: which incarnation.
        status: srun's exit code, where it is known.
        state: what Slurm says, where it was asked.
        down_hosts: those of the job's hosts that Slurm has lost, where it was asked.
        nodelist: the job's hosts, as Slurm writes them.
        sleep: waits; for tests.
    """
    job = read_json(run.job) or {}
    resources = job["resources"] if isinstance(job.get("resources"), dict) else {}
    nodes, per_node = (
        count if isinstance(count := resources.get(name), int) else 1 for name in ("nodes", "gpus_per_node")
    )
    world_size = nodes * per_node
    there = run.attempt(attempt)
    words = srun.with_the_reason(srun.read(_text(there.srun_log)), _text(run.slurm_log))
    logs = there.logs()
    failures = _failures(there, words, logs, sleep)
    found = {failure.rank for failure in failures}
    without_record = [end.rank for end in words.ends if not end.echo and end.rank not in found][:8]
    done = there.finished()
    submitted = run.submitted()
    nodelist = nodelist or (state.nodes if state else "")
    names = srun.hosts_of(nodelist) if nodelist else []
    hosts = tuple(name for name in names for _ in range(per_node)) if len(names) == nodes else ()
    seen = Evidence(
        workload=str(job.get("workload", "")),
        attempt=attempt,
        job_id=submitted.job_id if submitted else os.environ.get("SLURM_JOB_ID", ""),
        world_size=world_size,
        now=time.time(),
        failures=failures,
        done=done,
        words=words,
        status=status,
        state=state,
        down_hosts=down_hosts,
        time_min=resources.get("time_min"),
        hosts=hosts,
        logs=logs,
        last_lines={r: line for r in without_record if (line := blame.error_at_end(there.end_of_log(r)))},
        script_says=_last_line(run.slurm_log),
        srun_began=there.srun_log.exists(),
        srun_log=str(there.srun_log),
        slurm_log=str(run.slurm_log),
        slurm_log_exists=run.slurm_log.exists(),
        fault="" if failures else run.fault(),
    )
    step = _last_step(there.metrics)
    return replace(seen, last_steps={0: (step, 0.0)} if step else {})


_BY_NAME = 64
"""So many of the ranks that srun names are looked for by name."""
_UNNAMED = 8
"""So many of the ranks that nobody names are looked for."""


def _failures(
    attempt: Attempt, words: SrunWords, logs: Mapping[int, str], sleep: Callable[[float], None]
) -> tuple[Failure, ...]:
    """The records that ranks have left.

    An exception ends Python with code 1, and its record was written before: on a shared file system it may be on its
    way. Those that srun names are opened by name, since a folder's list may be an old one.
    """
    named = [end.rank for end in words.ends if not end.echo or end.code > 0][:_BY_NAME]
    awaited = {end.rank for end in words.ends if end.code == 1 and not end.echo}
    missing = sorted(attempt.failed().union(named))
    found: dict[int, Failure] = {}
    deadline = time.monotonic() + RECORD_WITHIN_S
    while True:
        found |= {rank: failure for rank in missing if (failure := _failure(attempt, rank, logs))}
        missing = [rank for rank in named if rank in awaited and rank not in found]
        if not missing or time.monotonic() >= deadline:
            break
        sleep(0.2)
    aborted = [end for end in words.ends if end.code == -signal.SIGABRT and end.rank not in found][:_BY_NAME]
    for end in aborted:
        said, log = attempt.end_of_log(end.rank), logs.get(end.rank, "")
        failure = blame.failure_of_exit(end.code, end.rank, end.host, time.time(), log, said)
        if not failure.own:
            found[end.rank] = failure
    return tuple(found[rank] for rank in sorted(found))


def _failure(attempt: Attempt, rank: int, logs: Mapping[int, str]) -> Failure | None:
    with contextlib.suppress(OSError):
        failure = Failure.from_json(read_json(attempt.failure(rank)))
        return failure and (failure if failure.log else replace(failure, log=logs.get(rank, "")))
    return None


def _text(path: Path) -> str:
    """A log's text; of a very long one, its beginning."""
    try:
        with open_regular(path) as file:
            return file.read(_AT_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _last_step(metrics: Path) -> str:
    steps = re.findall(r'^\{.*?"step": (\d+)[,}]', end_of(metrics, 10_000), re.MULTILINE)
    return steps[-1] if steps else ""


def _last_line(path: Path) -> str:
    lines = end_of(path, 10_000).splitlines()
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")


def conclude(run: RunDirectory, seen: Evidence) -> dict[str, Any]:
    """Leaves the record in the run directory, unless one is there that counts more; gives the one that counts."""
    record = outcome(seen)
    with contextlib.suppress(OSError):
        return run.publish(record)
    return record


# --- in the batch script ----------------------------------------------------------------------------------------------

_ASK_WITHIN_S = 5.0
_GRACE_AT_MOST_S = 3600.0
"""Seconds that a preempted job waits for Slurm to end it; a grace time is minutes."""


def ended(run_dir: str, attempt: str, status: str, *, sleep: Callable[[float], None] = time.sleep) -> str:
    """What the batch script runs when it ends and srun has failed, was not reached or left no result: leaves one.

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
    seen = gather(run, number, status=int(status), nodelist=env.get("SLURM_JOB_NODELIST", ""))
    if _may_be_preempted(seen):
        answer = query.ask_scontrol(
            env.get("SLURM_JOB_ID", seen.job_id), environment.for_queries(env), within_s=_ASK_WITHIN_S
        )
        seen = replace(seen, state=answer if isinstance(answer, JobState) else None)
        if seen.state is not None and seen.state.preempted:
            # A script that ends within the grace time has failed, and Slurm does not start it again.
            line = "meshrun: preempted; waiting for Slurm to put the job back into the queue"
            print(line, file=sys.stderr, flush=True)
            sleep(_GRACE_AT_MOST_S)
    record = conclude(run, seen)
    if record["status"] in BY_ITSELF:
        return f"meshrun: attempt {number}: the work is {record['status']}, and srun ended with code {status} after it"
    return f"meshrun: attempt {number} failed: {record['error']}"


def _may_be_preempted(seen: Evidence) -> bool:
    """Whether a SIGTERM ended it, as a preemption with a grace time begins; only Slurm can tell it from somebody's."""
    if any(failure.own for failure in seen.failures):
        return False
    cause = seen.words.cause or seen.words.later
    if cause:
        return cause in ("CANCELLED", "STEP_ENDED")
    first = [end.code for end in seen.words.ends if not end.echo]
    return -signal.SIGTERM in first if seen.words.ends else seen.status == 128 + signal.SIGTERM
