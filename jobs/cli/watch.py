"""Watches a job that goes on by itself: its place in the queue, rank 0's progress, then how it ended.

Such a job belongs to Slurm, or to itself: the watcher may leave, and come back with `submit.py wait`.
"""

from __future__ import annotations

import contextlib
import time

from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.progress import Display
from jobs.cli.report import report_end
from jobs.errors import EXIT_DONE, Interrupted, OutputLost
from jobs.run_dir import RunDirectory, Submitted
from jobs.runs.find import come_back
from jobs.runs.tracker import Tracker, track


def watch(run_dir: RunDirectory, submitted: Submitted, console: Console, *, from_the_start: bool = True) -> int:
    """Watches a job to its end. A queue has no deadline, so neither has this.

    Args:
        run_dir: the job's.
        submitted: what it became.
        console: where it is shown.
        from_the_start: the job was submitted just now; otherwise earlier output is not shown again.

    Returns:
        The exit code: the job's, or 130 where the wait was interrupted and the job left to itself.
    """
    began = time.monotonic()
    console.facts |= {"run_dir": str(run_dir.path), "job_id": submitted.job_id}
    display: Display | None = None
    job: Tracker | None = None
    try:
        display = Display(run_dir, console, from_the_start)
        job = track(run_dir, submitted)
        _until_over(job, display, from_the_start)
        display.close()
        record = job.record()
        _say_news(job, display)
    except Interrupted as interruption:
        if display is not None:
            display.close()
        return detached(run_dir, submitted, console, interruption, job is not None and job.has_ended())
    seconds = time.monotonic() - began if from_the_start else record.get("seconds")
    return report_end(record, console, seconds)


def _until_over(job: Tracker, display: Display, from_the_start: bool) -> None:
    def is_over() -> bool:
        over = job.is_over()
        _say_news(job, display)
        return over

    over = job.was_over()
    while not over and not from_the_start and not job.is_known():
        # Of a job that ended long ago, only the end is shown.
        over = is_over()
        job.pause()
    if over or is_over():
        return
    look = not from_the_start
    while not is_over():
        if look or not job.waits:
            display.update()
        look = False
        job.pause()
    display.update(ended=True)


def _say_news(job: Tracker, display: Display) -> None:
    for line in job.news():
        display.say(line)


def leave(run_dir: RunDirectory, submitted: Submitted, console: Console) -> int:
    """Says how to follow a job that was submitted just now and is not waited for.

    Returns:
        The exit code.
    """
    console.say(f"  follow it: {come_back(run_dir)}\n  end it:    {_end_line(submitted)}")
    console.finish({"status": "submitted", "exit_code": EXIT_DONE})
    return EXIT_DONE


def detached(
    run_dir: RunDirectory, submitted: Submitted, console: Console, why: BaseException, has_ended: bool = False
) -> int:
    """Says how to follow a job that is left to itself, or how to see the end of one whose end could not be shown.

    Returns:
        The exit code of an interruption.
    """
    interrupts.ignore()
    job = f"{'job' if submitted.executor == 'slurm' else 'process'} {submitted.job_id}"
    if has_ended:
        console.complain(f"meshrun: {why}; {job} has ended; to see how: {come_back(run_dir)}")
    else:
        line = f"{why}; {job} keeps running; follow it: {come_back(run_dir)}; end it: {_end_line(submitted)}"
        console.complain(f"meshrun: {line}")
    with contextlib.suppress(OutputLost):
        console.finish({"status": "interrupted" if has_ended else "detached", "exit_code": Interrupted.exit_code})
    return Interrupted.exit_code


def _end_line(submitted: Submitted) -> str:
    """The line that ends a job."""
    return f"{'scancel' if submitted.executor == 'slurm' else 'kill'} {submitted.job_id}"
