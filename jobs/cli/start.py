"""Hands a job to its executor, and writes down what it became."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from jobs import executor
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cluster import ClusterConfig
from jobs.errors import SubmissionUnknown
from jobs.run_dir import RunDirectory, Submitted
from jobs.spec import JobSpec

END_S = 10.0
"""Seconds that an interrupted job gets to end its ranks, before its agent is killed (and they with it)."""


def start_local(spec: JobSpec, cluster: ClusterConfig, console: Console, *, owned: bool) -> tuple[Any, Submitted]:
    """Starts a local job. The caller holds signals back meanwhile (`interrupts.held`).

    Args:
        spec: the job; its run directory describes it already.
        cluster: its cluster.
        console: learns that there is a job.
        owned: whether the job ends with this process.

    Returns:
        The agent's process, and what was written down of it.
    """
    process = executor.submit(spec, cluster, owned=owned)._process
    run_dir = RunDirectory(spec.run_dir)
    argument = str(run_dir.path)  # of the line that executor.render gives
    submitted = Submitted.now("local", str(process.pid), argument)
    try:
        run_dir.record_submission(submitted)
    except OSError:
        end(process)  # otherwise nobody could find it again
        raise
    console.job_started = True
    return process, submitted


def end(process: Any) -> None:
    """Asks the agent to end its ranks and itself; kills it if it does not (the ranks die with it)."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def start_slurm(spec: JobSpec, cluster: ClusterConfig, console: Console) -> Submitted:
    """Queues a job. The caller holds signals back meanwhile (`interrupts.held`).

    Raises:
        SubmissionError, SubmissionUnknown: as executor.submit; also where the job's number cannot be written down.
    """
    # A terminal sends Ctrl-C to sbatch too, which must not end in the middle of its request: it inherits the block.
    with interrupts.blocked():
        job = executor.submit(spec, cluster, owned=False)
    submitted = Submitted.now("slurm", str(job.job_id))
    console.facts["job_id"] = submitted.job_id
    console.job_started = True
    try:
        RunDirectory(spec.run_dir).record_submission(submitted)
    except OSError as error:
        raise SubmissionUnknown(
            f"job {job.job_id} is queued but cannot be followed, because its number could not be written down "
            f"({error.strerror}); look with squeue, and end it with scancel {job.job_id}"
        ) from error
    return submitted
