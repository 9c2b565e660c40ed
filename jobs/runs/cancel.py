"""Ends runs so that they may save first: Slurm jobs by scancel, local ones by signals to their agents."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import processes
from jobs.run_dir import RunDirectory
from jobs.runs import outcome
from jobs.runs.overview import TURN, Overview, ask_slurm
from jobs.slurm import environment, query
from jobs.slurm.query import Forgotten, JobState

ENDS_WITHIN_S = 10.0
"""Seconds that a local agent gets to end its ranks before it is killed, and its ranks with it."""


@dataclass(frozen=True)
class Cancelled:
    """What became of one run."""

    run: Overview
    action: str
    """`ended`: it had ended before; `cancelled`: it has ended now; `asked`: Slurm ends it; `failed`: it goes on."""
    what: str
    """The same in words."""

    @property
    def is_well(self) -> bool:
        return self.action != "failed"


def cancel(runs: Sequence[Overview], say: Callable[[str], None] = lambda line: None) -> list[Cancelled]:
    """Ends runs, given what is known of them. A run that has ended is left as it is.

    Args:
        runs: the runs, as `overviews` returned them a moment ago.
        say: is told what is waited for.
    """
    known = {run.path: _why_not(run) for run in runs}
    todo = [run for run in runs if known[run.path] is None]
    waiting = [run for run in todo if run.reason == TURN]
    for run in waiting:  # first, so that none of them takes the place of one that is ended
        record = {"status": "cancelled", "workload": run.workload, "attempt": 0, "error": "cancelled before its turn"}
        RunDirectory(run.path).publish(record)
        RunDirectory(run.path).forget_secrets()
        known[run.path] = Cancelled(run, "cancelled", "cancelled before its turn")
    todo = [run for run in todo if known[run.path] is None]
    on_slurm = _cancel_jobs([run for run in todo if run.executor == "slurm"])
    here = _end_agents([run for run in todo if run.executor != "slurm"], say)
    done = {one.run.path: one for one in [*on_slurm, *here]}
    return [known[run.path] or done[run.path] for run in runs]


def _why_not(run: Overview) -> Cancelled | None:
    """What there is to say of a run that is not cancelled."""
    if run.is_alive is False:
        return Cancelled(run, "ended", f"has ended already: {run.state}")
    if run.state == "COMPLETING":
        return Cancelled(run, "ended", f"job {run.job_id} is ending already: {run.state}")
    if run.is_alive is None:
        try_there = ""
        if run.executor == "local" and run.submit_host:
            try_there = f"; cancel it on {run.submit_host}"
        elif run.executor == "slurm":
            try_there = f"; try again later, or run scancel {run.job_id}"
        return Cancelled(run, "failed", f"nothing was done: {run.reason}{try_there}")
    return None


# --- on Slurm ---------------------------------------------------------------------------------------------------------


def _cancel_jobs(runs: Sequence[Overview]) -> list[Cancelled]:
    """Cancels Slurm jobs by one scancel, and looks by one squeue what became of them."""
    if not runs:
        return []
    problems = query.cancel([run.job_id for run in runs], environment.for_queries(os.environ))
    answers = ask_slurm({run.job_id: RunDirectory(run.path).script for run in runs})
    return [_cancelled(run, problems.get(run.job_id, ""), answers[run.job_id]) for run in runs]


def _cancelled(run: Overview, problem: str, answer: query.Answer) -> Cancelled:
    job = f"job {run.job_id}"
    if not problem and isinstance(answer, Forgotten) and run.state in query.WAITING and "_" in run.job_id:
        answer = JobState("CANCELLED")  # of an array's job that waits, Slurm (22.05) forgets at once that it was there
    ended = answer.state if isinstance(answer, JobState) and answer.ended else ""
    if problem:
        if ended:
            return Cancelled(run, "ended", f"{job} has ended just now: {ended}")
        return Cancelled(run, "failed", f"{job} was not cancelled: {problem}")
    if ended == "CANCELLED":
        _record_if_it_never_began(run, answer)
        return Cancelled(run, "cancelled", f"cancelled {job}, which was {run.state}")
    may_save = f"; its ranks may save within {run.grace_s:g} s" if run.grace_s and run.state == "RUNNING" else ""
    return Cancelled(run, "asked", f"{job} is being cancelled{may_save}")


def _record_if_it_never_began(run: Overview, answer: query.Answer) -> None:
    """Writes down the end of a job that nothing has run of, since Slurm forgets it after some minutes."""
    directory = RunDirectory(run.path)
    number = directory.last_attempt().number
    if not isinstance(answer, JobState) or directory.has_begun(number):
        return
    directory.forget_secrets()
    with contextlib.suppress(OSError):
        evidence = outcome.gather(directory, number, state=answer)
        outcome.conclude(directory, replace(evidence, job_id=run.job_id))


# --- on this machine --------------------------------------------------------------------------------------------------


def _end_agents(runs: Sequence[Overview], say: Callable[[str], None]) -> list[Cancelled]:
    """Asks all agents to let their ranks save, waits for them together, and ends those that do not end by that."""
    problems = _signal(runs, signal.SIGUSR1)
    asked = [run for run in runs if run.path not in problems]
    longest = max((run.grace_s for run in asked), default=0.0)
    if longest:
        say(f"waiting up to {longest:g} s for ranks to end their step and save")
    forced = left = _wait(asked, longest)
    for run in forced:
        directory = RunDirectory(run.path)
        record = {"status": "cancelled", "workload": run.workload, "error": "cancelled by submit.py cancel"}
        with contextlib.suppress(OSError):  # must come before the agent's own result, which knows only its signal
            directory.publish({**record, "attempt": directory.last_attempt().number})
    for signum in (signal.SIGTERM, signal.SIGKILL):  # ranks die with their agent
        problems |= _signal(left, signum)
        left = _wait(left, ENDS_WITHIN_S)
    problems |= {run.path: "it does not end, even after SIGKILL" for run in left if run.path not in problems}
    return [_ended(run, problems.get(run.path, ""), run in forced) for run in runs]


def _runs(run: Overview) -> bool:
    """Whether the process is there that the run was started as, and no later one with its number."""
    submitted = RunDirectory(run.path).submitted()
    is_same = submitted is not None and submitted.job_id == run.job_id
    return is_same and processes.runs(int(run.job_id), submitted.process_argument if submitted else "")


def _signal(runs: Sequence[Overview], signum: signal.Signals) -> dict[Path, str]:
    """Sends a signal to the agents that still run; returns why that could not be done, by run."""
    problems = {}
    for run in filter(_runs, runs):
        try:
            os.kill(int(run.job_id), signum)
        except ProcessLookupError:  # it has ended just now
            continue
        except OSError as error:
            problems[run.path] = str(error.strerror)
    return problems


def _wait(runs: Sequence[Overview], within_s: float) -> list[Overview]:
    """The runs whose agents still run after that time."""
    end = time.monotonic() + within_s
    while (left := [*filter(_runs, runs)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _ended(run: Overview, problem: str, was_forced: bool) -> Cancelled:
    process = f"process {run.job_id}"
    if problem:
        return Cancelled(run, "failed", f"{process} was not ended: {problem}")
    if was_forced:
        RunDirectory(run.path).forget_secrets()
        return Cancelled(run, "cancelled", f"{process} was ended, because its ranks did not stop when asked")
    directory = RunDirectory(run.path)
    directory.forget_secrets()
    record = directory.recorded() or {}
    how = {"stopped": "stopped", "done": "the work was done"}.get(record.get("status", ""), "it has ended")
    return Cancelled(run, "cancelled", f"{process}: {how} {record.get('error', '')}".rstrip())
