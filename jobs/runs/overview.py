"""What is known of runs right now: state, progress, loss, restarts. Changes nothing on disk and prints nothing.

A state is a word of Slurm's (https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES), for local runs, too:

    PENDING RUNNING COMPLETING ...   what Slurm says of a job that has not ended; a local run is RUNNING
    COMPLETED                        the work is done
    STOPPED                          it was asked to stop, and could save; `resume` goes on
    FAILED CANCELLED TIMEOUT ...     how it ended otherwise; CANCELLED also after Ctrl-C
    UNKNOWN                          nothing tells

Whether it may still be running is a fact of its own (`is_alive`), since a Slurm may have further states.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import processes
from jobs.errors import one_line
from jobs.excluded import excluded
from jobs.run_dir import RunDirectory, Submitted, end_of, is_undecided, read_json
from jobs.runs.sweep import is_queued
from jobs.slurm import environment, query, srun
from jobs.slurm.query import Answer, Forgotten, JobState, NoAnswer

COMPLETED, STOPPED, FAILED, CANCELLED, UNKNOWN = "COMPLETED", "STOPPED", "FAILED", "CANCELLED", "UNKNOWN"
_WORDS = {"done": COMPLETED, "stopped": STOPPED, "failed": FAILED, "cancelled": CANCELLED, "interrupted": CANCELLED}
"""What the `status` of a result.json is called."""
FAILING = (FAILED, "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "PREEMPTED", "REVOKED")
"""The states of a run that has ended and whose work is not done, though nobody wanted it to end."""
ENDED = (COMPLETED, STOPPED, CANCELLED, *FAILING)
TURN = "waits for its turn"
"""Why a point of a local sweep is PENDING."""
STANDS_AFTER_S = processes.DONE_WITHIN_S + 60
"""A result that is older than this stands, whatever Slurm would say: what lingers after the work is ended by then."""
SLURM_WITHIN_S = 15.0
"""Time limit of each command of Slurm's; somebody waits for the table."""
_METRICS_BYTES, _ROWS = 8192, 10
"""How much of metrics.jsonl's end is read, and how many of its last lines count."""


@dataclass(frozen=True)
class Overview:
    """One run at one moment."""

    path: Path
    workload: str = ""
    """A built-in's name, package.module:ENTRY, or the script that it runs."""
    executor: str = ""
    job_id: str = ""
    """Slurm's number; of a local run, its agent's process id."""
    submitted: str = ""
    """When, in UTC; empty if not known."""
    submit_host: str = ""
    state: str = UNKNOWN
    reason: str = ""
    """Why it waits or has ended, on one line; Slurm's own reason for a job that waits."""
    is_alive: bool | None = None
    """Whether it may still run or be started; None if that cannot be known from here."""
    hosts: str = ""
    """A running job's hosts, as Slurm writes them: `node[0-1]`."""
    expected_start: str = ""
    """Slurm's estimate for a pending job in the cluster's time: `2026-11-22 08:15`."""
    nodes: int | None = None
    gpus_per_node: int | None = None
    restarts: int = 0
    """How often it was started again: in place, by a requeue, or by `resume`."""
    step: int | None = None
    total_steps: int | None = None
    step_seconds: float | None = None
    """The mean of the last steps."""
    seconds_left: float | None = None
    """For the steps that are left, if it is alive."""
    stepped: float = 0.0
    """When the last step was written down, in seconds since the epoch."""
    loss: float | None = None
    """NaN and infinity are None here; they are in `metrics` as text."""
    rate: float | None = None
    """Throughput of the last step."""
    rate_unit: str = ""
    """Such as `tokens/s`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The newest value of each metric."""
    excluded: tuple[str, ...] = ()
    """Hosts that the run does without for now, because they were the root cause twice."""
    seconds: float | None = None
    """How long its attempts took together, once it has ended."""
    grace_s: float = 20.0
    """Seconds in which its ranks may save when it is cancelled."""
    changed: float = 0.0
    """When it was last started, took a step or ended, in seconds since the epoch."""

    @property
    def name(self) -> str:
        return RunDirectory(self.path).name


@dataclass(frozen=True)
class _Files:
    """What is read of a run directory before Slurm is asked."""

    run: RunDirectory
    job: dict[str, Any]
    submitted: Submitted | None
    attempt: int
    record: dict[str, Any] | None
    """How the newest attempt ended, unless another one follows it."""
    ended: float
    """When that was written."""

    @property
    def stands(self) -> bool:
        """Whether the record tells the end without anybody's being asked."""
        return self.record is not None and time.time() - self.ended > STANDS_AFTER_S

    @property
    def on_slurm(self) -> bool:
        return self.submitted is not None and self.submitted.executor == "slurm"


def overviews(
    runs: Sequence[RunDirectory], ask: Callable[[Mapping[str, str]], Mapping[str, Answer]] | None = None
) -> list[Overview]:
    """What is known of each run. Asks squeue once for all of them, and sacct at most once for what squeue forgot.

    Args:
        runs: the runs, in the order of the result.
        ask: asks Slurm; for tests.
    """
    files = [_read(run) for run in runs]
    asked = {one.submitted.job_id: one for one in files if one.on_slurm and one.submitted and not one.stands}
    answers = (ask or ask_slurm)({job: one.run.script for job, one in asked.items()}) if asked else {}
    lost = [job for job, one in asked.items() if one.record is None and not isinstance(answers.get(job), JobState)]
    if lost and ask is None:
        answers = {**answers, **_accounted({job: asked[job].run.script for job in lost}, answers)}
    return [_overview(one, answers.get(one.submitted.job_id) if one.submitted else None) for one in files]


def ask_slurm(scripts: Mapping[str, str]) -> dict[str, Answer]:
    """One squeue for all jobs, given the names of their batch scripts by their numbers."""
    return query.ask_queue(scripts, environment.for_queries(os.environ), SLURM_WITHIN_S)


def _accounted(scripts: Mapping[str, str], answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """What accounting adds: the ends of jobs that the controller has forgotten, or while it does not answer."""
    accounted = query.ask_accounting(scripts, environment.for_queries(os.environ), SLURM_WITHIN_S)
    added: dict[str, Answer] = {}
    for job, answer in accounted.items():
        if isinstance(answer, JobState) and answer.ended:
            is_final = answer.state in query.FINAL
            # A job that the controller has forgotten does not come back, whatever state it was in last.
            if is_final or isinstance(answers.get(job), Forgotten):
                added[job] = answer
    return added


def _read(run: RunDirectory) -> _Files:
    attempt = run.last_attempt()
    try:
        record = run.recorded(attempt.number)
    except OSError:
        record = None
    ended = 0.0
    if record is not None:
        ended = _changed(attempt.result) or _changed(run.result)
        if "next_attempt" in record:
            record = None
    return _Files(run, _json(run.job), _submitted(run), attempt.number, record, ended)


def _submitted(run: RunDirectory) -> Submitted | None:
    try:
        return run.submitted()
    except OSError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except OSError:  # such as no permission
        return {}


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _overview(files: _Files, answer: Answer | None) -> Overview:
    run, job, submitted, attempt = files.run, files.job, files.submitted, files.run.attempt(files.attempt)
    grace_s = _number(job.get("grace_s"))
    resources = job["resources"] if isinstance(job.get("resources"), dict) else {}
    seen = Overview(
        path=run.path,
        workload=_workload(job),
        executor=submitted.executor if submitted else _text(job.get("executor")),
        job_id=submitted.job_id if submitted else "",
        submitted=submitted.submitted if submitted else "",
        submit_host=submitted.host if submitted else "",
        nodes=_count(resources.get("nodes")),
        gpus_per_node=_count(resources.get("gpus_per_node")),
        restarts=files.attempt,
        seconds=_seconds(files),
        grace_s=Overview.grace_s if grace_s is None else grace_s,
    )
    if files.on_slurm:
        seen = _on_slurm(seen, files, answer)
    elif submitted is not None:
        seen = _local(seen, files, submitted)
    elif files.record is None and seen.executor == "local" and run.sweep is not None:
        seen = _in_a_queue(seen, run)
    else:
        seen = _of_record(seen, files) if files.record else replace(seen, reason=_why_unknown(files))
    if seen.is_alive is False:
        run.forget_secrets()  # if everything was killed that would have done so
    metrics = run.metrics if run.metrics.exists() else attempt.metrics
    seen = _with_progress(seen, job, metrics)
    stepped = _changed(metrics)
    return replace(
        seen,
        excluded=tuple(one.host for one in excluded(run)) if seen.is_alive is not False else (),
        stepped=stepped if seen.step is not None else 0.0,
        changed=max(files.ended, stepped, *map(_changed, (run.job, run.submission, attempt.status))),
    )


def _seconds(files: _Files) -> float | None:
    """How long all attempts took together; None if the newest one has not said it."""
    newest = _number((files.record or {}).get("seconds"))
    if newest is None:
        return None
    before = (_number((files.run.recorded(number) or {}).get("seconds")) for number in range(files.attempt))
    return newest + sum(seconds or 0.0 for seconds in before)


# --- its state --------------------------------------------------------------------------------------------------------


def _of_record(seen: Overview, files: _Files, is_alive: bool | None = False) -> Overview:
    """The state that the run directory tells alone."""
    record = files.record or {}
    state = _WORDS.get(record.get("status", ""), UNKNOWN)
    by_slurm = record.get("slurm_state")
    if state == FAILED and by_slurm in (CANCELLED, *FAILING):
        state = str(by_slurm)
    reason = "" if state == COMPLETED else one_line(record.get("error", ""))
    return replace(seen, state=state, reason=reason, is_alive=is_alive)


def _on_slurm(seen: Overview, files: _Files, answer: Answer | None) -> Overview:
    record = files.record
    if isinstance(answer, JobState) and (not answer.ended or (answer.may_return and answer.source == "squeue")):
        start = answer.expected_start
        return replace(
            seen,
            state=answer.state,
            reason=one_line(answer.reason),
            is_alive=True,
            hosts=answer.nodes,
            expected_start=f"{start:%Y-%m-%d %H:%M}" if start else "",
        )
    ended = answer.state if isinstance(answer, JobState) else ""
    if record is not None:
        is_known = files.stands or not isinstance(answer, NoAnswer)
        seen = _of_record(seen, files, False if is_known else None)
        # Slurm's word says more than an end for which the run directory has no cause, or than a stop that it followed.
        is_vague = is_undecided(record) or (record["status"] == "failed" and not record.get("failure"))
        return replace(seen, state=ended) if is_vague and ended not in ("", FAILED, COMPLETED) else seen
    if ended:
        reason = answer.reason if isinstance(answer, JobState) else ""
        return replace(seen, state=ended, reason=one_line(reason), is_alive=False)
    if isinstance(answer, Forgotten):
        attempt = files.run.attempt(files.attempt)
        log = srun.with_the_reason(srun.read(end_of(attempt.srun_log, 100_000)), end_of(files.run.slurm_log, 100_000))
        if log.cause in ENDED:
            return replace(seen, state=log.cause, is_alive=False)
        if "_" in seen.job_id and not files.run.has_begun(files.attempt):  # as when scancel ends what waits of an array
            return replace(
                seen, state=CANCELLED, reason=f"job {seen.job_id} was cancelled before it started", is_alive=False
            )
        why = f"Slurm no longer knows job {seen.job_id}, and nothing in the run directory says how it ended"
        return replace(seen, reason=why, is_alive=False)
    detail = answer.detail if isinstance(answer, NoAnswer) else "it was not asked"
    return replace(seen, reason=one_line(f"Slurm does not answer: {detail}"), is_alive=None)


def _local(seen: Overview, files: _Files, submitted: Submitted) -> Overview:
    is_here = submitted.host == socket.gethostname()
    if is_here and processes.runs(int(submitted.job_id), submitted.process_argument):
        return replace(seen, state="RUNNING", is_alive=True)
    if files.record is not None:
        return _of_record(seen, files)
    if is_here:
        return replace(seen, state=FAILED, reason="its agent has ended and left no result", is_alive=False)
    return replace(seen, reason=f"was started on {submitted.host}, which alone knows whether it runs")


def _in_a_queue(seen: Overview, run: RunDirectory) -> Overview:
    """A point of a local sweep that has not begun."""
    if is_queued(run):
        return replace(seen, state="PENDING", reason=TURN, is_alive=True)
    return replace(seen, state=CANCELLED, reason="its sweep has ended without starting it", is_alive=False)


def _why_unknown(files: _Files) -> str:
    if files.job.get("executor") == "debug":
        return "--executor debug: it runs inside the command that started it, or was killed"
    if files.job.get("cluster") == "none":
        return f"was started by {_text(files.job.get('executor')) or 'another launcher'}, and has left no result"
    if files.run.script:
        return "sbatch could not tell whether it queued the job; submit.py wait asks Slurm"
    return "has no submission.json: it is being submitted, or was not submitted"


# --- its progress -----------------------------------------------------------------------------------------------------


def _with_progress(seen: Overview, job: Mapping[str, Any], path: Path) -> Overview:
    """Adds what the last lines of metrics.jsonl tell."""
    metrics: dict[str, Any] = {}
    paces: dict[int, float] = {}
    for line in end_of(path, _METRICS_BYTES).splitlines()[-_ROWS:]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # half a line, at either end
            continue
        if not isinstance(row, dict) or _count(row.get("step")) is None:
            continue
        metrics |= row
        if (pace := _number(row.get("step_seconds"))) is not None:
            paces[row["step"]] = pace
    settings = job.get("settings")
    step = _count(metrics.get("step"))
    total = _count(metrics.get("total_steps")) or _count(settings.get("steps") if isinstance(settings, dict) else None)
    pace = sum(paces.values()) / len(paces) if paces else None
    has_more = seen.is_alive and step is not None and total is not None and pace is not None
    losses = [name for name in metrics if name == "loss"] or [name for name in metrics if name.endswith("loss")]
    rates = [name for name in metrics if name.endswith("_per_second") and _number(metrics[name]) is not None]
    rate, unit = (_number(metrics[rates[0]]), f"{rates[0].removesuffix('_per_second')}/s") if rates else (None, "")
    if rate is None and pace:
        rate, unit = 1 / pace, "steps/s"
    return replace(
        seen,
        step=step,
        total_steps=total,
        step_seconds=pace,
        seconds_left=max(0, (total or 0) - (step or 0)) * (pace or 0.0) if has_more else None,
        loss=_number(metrics[losses[0]]) if losses else None,
        rate=rate,
        rate_unit=one_line(unit),
        metrics=metrics,
    )


def _workload(job: Mapping[str, Any]) -> str:
    settings = job.get("settings")
    if job.get("workload") == "script" and isinstance(settings, dict):
        return _text(settings.get("path")) or _text(settings.get("module")) or "script"
    return _text(job.get("workload"))


def _text(value: Any) -> str:
    return one_line(value) if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def _number(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -1e300 < value < 1e300 else None
