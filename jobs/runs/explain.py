"""A run directory, and Slurm's answer where there is a Slurm, -> the facts from which `causes` explains the run.

It only reads: the result of a job that left none is worked out by the same functions as in `submit.py wait`, which
then would write it down.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import re
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import blame, processes
from jobs.blame import Failure
from jobs.excluded import excluded
from jobs.run_dir import Attempt, RunDirectory, Submitted, end_of, open_regular, read_json
from jobs.runs import find, outcome
from jobs.runs.cause import Cause, Facts, Mark
from jobs.runs.causes import cause_of
from jobs.runs.local_job import LocalJob
from jobs.runs.outcome import Evidence
from jobs.runs.slurm_job import SlurmJob
from jobs.slurm import query, srun
from jobs.slurm.query import Forgotten, JobState, NoAnswer
from workloads.training import checkpoint_files

SLURM_WITHIN_S = 15.0
"""Time limit of each command of Slurm's; somebody waits for the answer."""
FRESH_S = 30.0
"""status.json is written every 2 s; a shared file system may show it later."""
MOST_BYTES = 512 * 2**20
"""Longer logs are named without a line."""
MOST_FAILURES = 64
"""How many records of other ranks are read."""
NO_ROOM_BYTES = 2**16
SAID_AGAIN_S = 60.0
"""How late the leader may be to say again that nothing moves."""


def explain(run: RunDirectory, attempt: int | None = None) -> Cause:
    """Why a run, or one attempt of it, failed, hangs or waits."""
    return cause_of(facts_of(run, attempt))


def facts_of(run: RunDirectory, attempt: int | None = None) -> Facts:
    """What is known of a run.

    Args:
        run: its directory, which is not changed.
        attempt: an earlier one, to be looked at alone; None: the run as it is now.
    """
    job = _json(run.job)
    resources = job["resources"] if isinstance(job.get("resources"), dict) else {}
    number = run.last_attempt().number if attempt is None else attempt
    nodes, per_node = (_count(resources.get(name)) or 1 for name in ("nodes", "gpus_per_node"))
    memory = resources.get("mem_gb_per_gpu")
    after = job["after"] if isinstance(job.get("after"), list) else []
    facts = Facts(
        stage="unknown",
        run=_path(run),
        executor=str(job.get("executor", "")),
        ranks=nodes * per_node,
        hosts=nodes,
        max_restarts=_count(job.get("max_restarts")) or 0,
        time_min=_count(resources.get("time_min")),
        mem_gb_per_gpu=float(memory) if isinstance(memory, (int, float)) else None,
        attempt=number,
        checkpoint=_newest_checkpoint(run),
        disk_is_full=_is_full(run.path),
        after=[RunDirectory(Path(str(path))).name for path in after],
        excluded=tuple(one.host for one in excluded(run)),
    )
    submitted = find.submission(run, writes=False)
    if submitted is not None:
        facts = replace(facts, job_id=submitted.job_id, executor=submitted.executor, waited_s=_since(submitted))
    facts = _with_progress(facts, run.attempt(number), job)
    if attempt is not None and attempt < run.last_attempt().number:
        return _of_an_earlier_one(facts, run)
    facts = replace(facts, earlier=_earlier(run, number))
    if submitted is None:
        facts = _without_a_job(facts, run, job)
    elif submitted.executor == "slurm":
        facts = _on_slurm(facts, run, submitted)
    else:
        facts = _local(facts, run, submitted)
    return facts


# --- its stage --------------------------------------------------------------------------------------------------------


def _without_a_job(facts: Facts, run: RunDirectory, job: Mapping[str, Any]) -> Facts:
    record = run.recorded()
    if record is not None:
        return _with_the_end(facts, run, record)
    if _is_heard(facts):
        return replace(facts, stage="runs")
    if job.get("cluster") == "none":
        return replace(facts, doubt="another launcher than submit.py started it, and it has left no result")
    return replace(facts, doubt=find.why_not_submitted(run).partition(": ")[2])


def _local(facts: Facts, run: RunDirectory, submitted: Submitted) -> Facts:
    tracked = LocalJob(run, submitted, writes=False)
    record = tracked.result.read()
    if record is not None:
        return _with_the_end(facts, run, record)
    if submitted.host == socket.gethostname():
        if processes.runs(int(submitted.job_id), submitted.process_argument):
            return _running(facts, run)
        return _with_the_end(facts, run, tracked.record())
    if _is_heard(facts):
        return _running(facts, run)
    return replace(facts, doubt=f"it was started on {submitted.host}, which alone knows whether it still runs")


def _on_slurm(facts: Facts, run: RunDirectory, submitted: Submitted) -> Facts:
    tracked = SlurmJob(run, submitted, writes=False)
    answer = tracked.ask_once(SLURM_WITHIN_S)
    record = tracked.result.read()
    if isinstance(answer, JobState):
        facts = replace(facts, state=answer)
        if answer.waits:
            if answer.reason == "Dependency":
                shown = query.ask_scontrol(submitted.job_id, tracked.env, tracked.script, SLURM_WITHIN_S)
                facts = replace(facts, state=shown if isinstance(shown, JobState) and shown.waits else answer)
            if run.has_begun(facts.attempt):  # it was requeued
                facts = replace(facts, attempt=facts.attempt + 1)
            return replace(facts, stage="waits", earlier=_earlier(run, facts.attempt, is_last_in_log=True))
        if not answer.ended and record is None:
            return _running(facts, run)
        if answer.may_return and answer.state == "REQUEUED":
            return replace(facts, doubt="Slurm is just putting it back into the queue")
    ended = answer if isinstance(answer, JobState) and answer.ended else None
    evidence = tracked.evidence(ended)
    if record is None and isinstance(answer, NoAnswer) and evidence.is_empty:
        if _is_heard(facts):
            return _running(facts, run)
        return replace(
            facts, doubt=f"Slurm does not answer here ({answer.detail}), and the run directory does not tell"
        )
    if record is None and isinstance(answer, Forgotten) and evidence.is_empty:
        doubt = "Slurm no longer knows the job, and nothing in the run directory tells how it ended"
        return replace(facts, stage="ended", record={"status": "failed", "error": doubt})
    if isinstance(answer, NoAnswer):  # of which `record` would speak as after a long wait
        tracked.answer = Forgotten()
    return _with_the_end(facts, run, tracked.record(), evidence)


def _of_an_earlier_one(facts: Facts, run: RunDirectory) -> Facts:
    """Of an attempt that others followed. What slurm.log says last is not about it, so only its own srun.log counts."""
    record, attempt = run.recorded(facts.attempt), run.attempt(facts.attempt)
    did = srun.read(end_of(attempt.srun_log, 1_000_000)).cause if record is None else ""
    if record is None and did in ("TIMEOUT", "PREEMPTED", "NODE_FAIL"):
        return replace(facts, stage="ended", slurm_did=did)
    return _with_the_end(replace(facts, executor="local") if record is None else facts, run, record or {})


def _running(facts: Facts, run: RunDirectory) -> Facts:
    attempt = run.attempt(facts.attempt)
    stands = _mark(attempt.agent_log(), rb"WARNING: (no (?:step|movement|rank) .*)", last=True)
    marks = {"stands": stands} if stands else {}
    said_at, stood = _changed(attempt.stacks), re.search(r" for (\d+) s", stands.text if stands else "")
    moved = _changed(attempt.metrics) > said_at
    # The leader says it again once it has stood still for twice as long: if it has not, a rank has moved.
    moved = moved or (stood is not None and time.time() - said_at > float(stood[1]) + SAID_AGAIN_S)
    stacks = str(attempt.stacks) if attempt.stacks.exists() else ""
    earlier = _earlier(run, facts.attempt, is_last_in_log=True)
    return replace(facts, stage="runs", marks=marks, has_moved_since=moved, stacks=stacks, earlier=earlier)


def _is_heard(facts: Facts) -> bool:
    return facts.heard_s is not None and facts.heard_s < FRESH_S


# --- how it ended -----------------------------------------------------------------------------------------------------


def _with_the_end(
    facts: Facts, run: RunDirectory, record: Mapping[str, Any], evidence: Evidence | None = None
) -> Facts:
    """Adds what is known of the end of the attempt."""
    attempt = run.attempt(facts.attempt)
    failure = Failure.from_json(record.get("failure"))
    if facts.executor == "slurm":
        evidence = evidence or outcome.gather(run, facts.attempt, writes=False)
    if failure is not None:
        failure = replace(failure, log=_moved(failure.log, attempt))
        failure = _known_by_srun(failure, evidence) if evidence else failure
    by_rank = [Failure.from_json(_json(attempt.failure(rank))) for rank in sorted(attempt.failed())[:MOST_FAILURES]]
    others = tuple(one for one in by_rank if one is not None and (failure is None or one.rank != failure.rank))
    facts = replace(
        facts,
        stage="ended",
        record=record,
        failure=failure,
        details=_json(attempt.failure_record),
        failures=others,
        stacks=str(attempt.stacks) if attempt.stacks.exists() else "",
        collectives=f"{attempt.path.name}/{attempt.collectives.name}*" if _recorded(attempt) else "",
        marks=_marks(run, attempt, failure, str(record.get("error", ""))),
    )
    if evidence is None:
        return facts
    did, by_record = evidence.cause, record.get("slurm_state")
    if not did and by_record not in (None, "COMPLETED", "FAILED"):
        did = str(by_record)
    lost = evidence.srun.lost_hosts or evidence.down_hosts
    return replace(facts, slurm_did=did, lost_hosts=tuple(lost), by=facts.state.by if facts.state else "")


def _known_by_srun(failure: Failure, evidence: Evidence) -> Failure:
    """Adds how an agent ended of which the leader knew only that it was gone; srun may have said so later."""
    end = next((end for end in evidence.srun.first_ends if end.host == failure.host), None)
    if failure.kind != "agent" or failure.message != blame.VANISHED or end is None:
        return failure
    return replace(evidence.of_agent(end), rank=failure.rank, when=failure.when, log=evidence.srun_log)


def _marks(run: RunDirectory, attempt: Attempt, failure: Failure | None, error: str) -> dict[str, Mark]:
    """The lines of logs that show something; see Facts.marks."""
    found: dict[str, Mark | None] = {}
    if failure is not None and failure.log:
        log = Path(failure.log)
        if failure.kind in ("error", "exit"):  # others' tracebacks are stacks, or another rank's
            found["ends"] = _mark(log, re.escape(blame.ENDS).encode(), last=True) or _mark(log, _TRACEBACK, last=True)
        if failure.kind == "killed":
            found["fatal"] = _mark(log, rb"^Fatal Python error: ", last=True)
        how = _mark(log, rb"srun: error: \S+: tasks? ") or _end(log)
        found["log"] = how if failure.kind == "agent" else Mark(str(log), 0) if log.exists() else None
    elif named := re.search(r"\(log: ([^)]+)\)", error):
        found["log"] = _end(Path(_moved(named[1], attempt)))
    found["slurm"] = _mark(run.slurm_log, rb"\*\*\* JOB \S+ ON \S+ CANCELLED AT", last=True) or _mark(
        attempt.srun_log, rb"CANCELLED AT|Node failure on|srun: (Job step aborted|got SIGCONT|forcing job)"
    )
    memory = rb"oom-kill event|[Oo]ut [Oo]f [Mm]emory|OOM Killed"
    found["memory"] = _mark(attempt.srun_log, memory) or _mark(run.slurm_log, memory, last=True)
    return {name: mark for name, mark in found.items() if mark is not None}


_TRACEBACK = rb"^(\[rank\d+\]: )?Traceback \(most recent call last\):"
"""How a script's traceback begins; torch puts the rank before it."""


def _mark(path: Path, pattern: bytes, *, last: bool = False) -> Mark | None:
    """The first or last line that a pattern is found in; its text is the pattern's group, if it has one."""
    wanted, found = re.compile(pattern), None
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                return Mark(str(path), 0)
            for number, line in enumerate(file, 1):
                if match := wanted.search(line):
                    text = match[1] if match.lastindex else line
                    found = Mark(str(path), number, text.decode("utf-8", errors="replace").strip()[:2000])
                    if not last:
                        break
    except OSError:
        return None
    return found


def _end(path: Path) -> Mark | None:
    """The last line of a log that is not empty."""
    return _mark(path, rb"\S", last=True)


def _moved(log: str, attempt: Attempt) -> str:
    """Where a log is now: the run directory may have been moved since it was noted."""
    here = attempt.path / Path(log).name if log else None
    return str(here) if here is not None and here.exists() else log


def _earlier(run: RunDirectory, before: int, *, is_last_in_log: bool = False) -> tuple[tuple[int, str], ...]:
    """How the attempts before one ended, as far as is known.

    Args:
        run: the run.
        before: the attempt.
        is_last_in_log: whether it has not ended, so that what slurm.log says last is about the one before.
    """
    found = []
    for number in range(before):
        record = run.recorded(number)
        if record is None and number == before - 1 and is_last_in_log:  # Slurm ended it at once
            evidence = outcome.gather(run, number, writes=False)
            record = None if evidence.is_empty else outcome.outcome(evidence)
        if record is not None and record.get("error"):
            found.append((number, str(record["error"])))
    return tuple(found)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _with_progress(facts: Facts, attempt: Attempt, job: Mapping[str, Any]) -> Facts:
    """Adds where the ranks were last seen."""
    progress = _json(attempt.status)
    written = progress.get("written")
    heard = max(0.0, time.time() - written) if isinstance(written, (int, float)) else None
    step = total = None
    for line in end_of(attempt.metrics, 20_000).splitlines():
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            row = json.loads(line)
            step, total = _count(row.get("step")) or step, _count(row.get("total_steps")) or total
    settings = job.get("settings")
    total = total or _count(settings.get("steps") if isinstance(settings, dict) else None)
    stepped = max(0.0, time.time() - _changed(attempt.metrics)) if step is not None else None
    return replace(facts, progress=progress or None, heard_s=heard, step=step, total_steps=total, stepped_s=stepped)


def _path(run: RunDirectory) -> str:
    """The run's path, as short as can be pasted."""
    path = run.path
    with contextlib.suppress(OSError):
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


def _newest_checkpoint(run: RunDirectory) -> str:
    with contextlib.suppress(OSError, ValueError):
        folders = checkpoint_files.published(run.checkpoints)
        return folders[0].name if folders else ""
    return ""


def _recorded(attempt: Attempt) -> bool:
    return any(attempt.path.glob(f"{attempt.collectives.name}[0-9]*"))


def _is_full(path: Path) -> bool:
    try:
        there = os.statvfs(path)
    except OSError:
        return False
    return there.f_bavail * there.f_frsize < NO_ROOM_BYTES


def _since(submitted: Submitted) -> float | None:
    try:
        return time.time() - calendar.timegm(time.strptime(submitted.submitted, "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
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


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
