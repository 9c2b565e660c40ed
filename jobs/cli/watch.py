"""Follows a job that runs independently of this command: its state in the queue, rank 0's progress, its result.

The command may stop following at any time, and `submit.py wait` follows the job again.
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
    """Follows a job until it ends. A queue has no deadline, so neither has this.

    Args:
        run_dir: the job's run directory.
        submitted: the recorded submission.
        console: where the progress is shown.
        from_the_start: whether the job was submitted just now; otherwise earlier output is not repeated.

    Returns:
        The exit code of the job, or 130 if the wait was interrupted and the job keeps running.
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
    return report_end(record, console, seconds, run_dir)


def _until_over(job: Tracker, display: Display, from_the_start: bool) -> None:
    def is_over() -> bool:
        over = job.is_over()
        _say_news(job, display)
        return over

    over = job.was_over()
    while not over and not from_the_start and not job.is_known():
        # For a job that ended long ago, only the result is shown.
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


def leave(run_dir: RunDirectory, console: Console) -> int:
    """Prints how to follow a job that was just submitted without --wait.

    Returns:
        The exit code.
    """
    console.say(f"  follow it: {come_back(run_dir)}\n  end it:    {come_back(run_dir, 'cancel')}")
    console.finish({"status": "submitted", "exit_code": EXIT_DONE})
    return EXIT_DONE


def detached(
    run_dir: RunDirectory, submitted: Submitted, console: Console, why: BaseException, has_ended: bool = False
) -> int:
    """Prints how to follow a job that keeps running, or how to see the result of one that has ended.

    Returns:
        The exit code of an interruption.
    """
    interrupts.ignore()
    job = f"{'job' if submitted.executor == 'slurm' else 'process'} {submitted.job_id}"
    if has_ended:
        console.complain(f"meshrun: {why}; {job} has ended; see its result with: {come_back(run_dir)}")
    else:
        lines = f"follow it: {come_back(run_dir)}; end it: {come_back(run_dir, 'cancel')}"
        console.complain(f"meshrun: {why}; {job} keeps running; {lines}")
    with contextlib.suppress(OutputLost):
        console.finish({"status": "interrupted" if has_ended else "detached", "exit_code": Interrupted.exit_code})
    return Interrupted.exit_code
