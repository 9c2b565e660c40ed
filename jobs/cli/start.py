"""Hands a job to its executor and records the submission."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs import executor
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cluster import ClusterConfig
from jobs.errors import SubmissionUnknown
from jobs.run_dir import RunDirectory, Submitted
from jobs.spec import JobSpec
from workloads.errors import reason

END_S = 10.0
"""Seconds that an interrupted job gets to end its ranks before its agent, and with it the ranks, is killed."""


def start_local(spec: JobSpec, cluster: ClusterConfig, console: Console, *, owned: bool) -> tuple[Any, Submitted]:
    """Starts a local job. The caller must hold back signals (`interrupts.held`).

    Args:
        spec: the job, which is already described in its run directory.
        cluster: its cluster config.
        console: is told that the job has started.
        owned: whether the job ends with this process.

    Returns:
        The agent's process and the recorded submission.
    """
    process = executor.submit(spec, cluster, owned=owned)._process
    run_dir = RunDirectory(spec.run_dir)
    argument = str(run_dir.path)  # part of the command line from executor.render
    submitted = Submitted.now("local", str(process.pid), argument)
    try:
        run_dir.record_submission(submitted)
    except OSError:
        end(process)  # otherwise the process could not be found again
        raise
    console.job_started = True
    return process, submitted


def end(process: Any, signum: int = signal.SIGTERM) -> None:
    """Asks the agent to end its ranks and itself; kills it after END_S, and the ranks die with it."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signum)
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def start_slurm(
    spec: JobSpec, cluster: ClusterConfig, console: Console, array: str = "", points: Sequence[RunDirectory] = ()
) -> Submitted:
    """Queues a job. The caller must hold back signals (`interrupts.held`).

    Args:
        spec: the job, which is already described in its run directory.
        cluster: its cluster config.
        console: is told that the job is queued.
        array: as `executor.render` takes it: the job is a sweep, whose folder is its run directory.
        points: the run directories of the sweep's points.

    Raises:
        SubmissionError, SubmissionUnknown: as executor.submit; also if the job's number cannot be recorded.
    """
    # A terminal sends Ctrl-C to sbatch too, which must not end during its request; it inherits the block.
    with interrupts.blocked():
        job = executor.submit(spec, cluster, owned=False, array=array)
    submitted = Submitted.now("slurm", str(job.job_id))
    console.facts["job_id"] = submitted.job_id
    console.job_started = True
    try:
        if not array:
            RunDirectory(spec.run_dir).record_submission(submitted)
        for run_dir in points:
            run_dir.record_submission(replace(submitted, job_id=f"{submitted.job_id}_{run_dir.path.name}"))
    except OSError as error:
        raise SubmissionUnknown(
            f"job {job.job_id} is queued but cannot be followed, because its number could not be recorded "
            f"({reason(error)}); check it with squeue, or end it with scancel {job.job_id}"
        ) from error
    return submitted
