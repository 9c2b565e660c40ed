"""JobSpec + ClusterConfig -> submitit parameters and the exact submission (pure) -> a submitted job."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import code_copy, secret_values
from jobs.cluster import ClusterConfig
from jobs.errors import SubmissionError, SubmissionUnknown
from jobs.run_dir import RunDirectory
from jobs.slurm import environment, script
from jobs.spec import JobSpec


@dataclass(frozen=True)
class Submission:
    """What is handed to submitit, and the resulting script or command."""

    parameters: dict[str, Any]
    """The options that the scheduler gets."""
    text: str
    """The batch script (slurm), or the command (local, debug)."""
    env: dict[str, str]
    """Environment variables of every rank."""


def render(spec: JobSpec, cluster: ClusterConfig, array: str = "") -> Submission:
    """The submission of a job. Pure, so that `--dry-run` prints exactly what would be submitted.

    Args:
        spec: the job.
        cluster: its cluster config.
        array: as `script.script` takes it; empty: it is one job.
    """
    env = spec.rank_env
    if spec.executor == "slurm":
        text = script.script(spec, cluster, env, array)
        return Submission(slurm_parameters(spec, cluster, array), text, env)
    if spec.executor == "debug":
        return Submission({}, "one rank in this process", env)
    shape = {"nodes": spec.resources.nodes, "tasks_per_node": spec.resources.gpus_per_node}
    return Submission({**shape, **_time(spec)}, shlex.join(_agent_command(spec, attempt=0)), env)


def slurm_parameters(spec: JobSpec, cluster: ClusterConfig, array: str = "") -> dict[str, Any]:
    """The script's options of sbatch and of srun, and the site's setup lines."""
    options = script.options(spec, cluster, array)
    return {"sbatch": options, "srun": script.srun_arguments(spec, cluster, options), "setup": cluster.setup}


def _time(spec: JobSpec) -> dict[str, int]:
    return {} if spec.resources.time_min is None else {"timeout_min": spec.resources.time_min}


def _agent_command(spec: JobSpec, attempt: int) -> list[str]:
    """The command that starts the agent of a local job."""
    return [sys.executable, "-u", str(code_copy.entry(spec)), "--agent", str(spec.run_dir), str(attempt)]


SUBMIT_WITHIN_S = 120
"""Time limit of sbatch in seconds; it retries by itself if the controller is busy."""
FIND_AFTER_S = (0.0, 1.0, 4.0)
"""Seconds to wait before each search of the queue for a job that may have been queued."""


def check_slurm(submission: Submission) -> str:
    """Asks Slurm whether it would accept the job, before anything is written.

    Returns:
        When and where the job would start, according to Slurm; may be empty.

    Raises:
        SubmissionError: sbatch or srun is not on PATH, or sbatch would refuse the job; quotes sbatch.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise SubmissionError(
            f"--executor slurm: {' and '.join(missing)} not found on PATH; submit from a login node, "
            "or use --executor local"
        )
    from jobs.slurm import query  # late: a dry run asks nothing

    return query.would_queue(submission.text, submission.parameters["sbatch"], os.environ)


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Removes variables that would change the submission; sbatch, which submitit starts, inherits this environment."""
    before = dict(os.environ)
    kept = environment.clean(before)
    for name in set(before) - set(kept):
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def submit(spec: JobSpec, cluster: ClusterConfig, *, owned: bool, array: str = "") -> Any:
    """Hands the job to submitit; the run directory exists already.

    Args:
        spec: the job.
        cluster: its cluster config.
        owned: whether the job ends with this process (local jobs only).
        array: as `render` takes it.

    Returns:
        submitit's job: a LocalJob or a SlurmJob.

    Raises:
        SubmissionError: sbatch refused the job, and nothing is queued; quotes sbatch.
        SubmissionUnknown: something failed after sbatch was called.
    """
    from jobs.job import Job

    submission = render(spec, cluster, array)
    run = RunDirectory(spec.run_dir)
    job = Job(secret_values.public(spec))  # nothing reads the pickle: agents read the run directory
    if spec.executor == "local":
        from jobs.local_executor import LocalExecutor

        attempt = run.begin_attempt()
        command = _agent_command(spec, attempt.number)
        return LocalExecutor(run.submitit, command, attempt.agent_log(), owned, submission.env).submit(job)
    assert spec.executor == "slurm"
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    from jobs.slurm import query

    class _Executor(SlurmExecutor):
        @classmethod
        def name(cls) -> str:
            return "slurm"

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return submission.text

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            # sbatch may have inherited a blocked SIGTERM, hence --kill-after.
            return ["timeout", "--kill-after=5", str(SUBMIT_WITHIN_S), "sbatch", str(submission_file_path)]

    # submitit would also print sbatch's stderr, which the error contains anyway.
    with warnings.catch_warnings(), _clean_environment(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            executor = _Executor(run.submitit)
            resources = spec.resources
            executor.update_parameters(nodes=resources.nodes, ntasks_per_node=resources.gpus_per_node)
            return executor.submit(job)
        except FailedJobError as error:
            message = " ".join(str(error).split())
            if getattr(error.__cause__, "returncode", None) in (124, 137, -9):
                message = f"sbatch did not answer within {SUBMIT_WITHIN_S} s; {message}"
            elif not query.LOST.search(message):
                query.check_reached(message)
                raise SubmissionError(f"sbatch refused the job: {message or type(error).__name__}") from None
        except (RuntimeError, OSError) as error:  # sbatch's answer could not be parsed or saved
            message = f"the submission failed midway: {type(error).__name__}: {' '.join(str(error).split())}"
        for seconds in FIND_AFTER_S:
            time.sleep(seconds)
            job_id = query.find(run.submitit, environment.for_queries(os.environ))
            if job_id:
                return executor.job_class(folder=run.submitit, job_id=job_id.partition("_")[0])
        raise SubmissionUnknown(
            f"it is not known whether the job is queued: {message}; check with `squeue --me`, and cancel it if it is; "
            f"once it runs, `submit.py wait {shlex.quote(str(spec.run_dir))}` follows it"
        )


def debug_env(spec: JobSpec) -> dict[str, str]:
    """The environment variables of the single rank that the debug executor runs in this process."""
    from jobs.rank.identity import local_env

    return local_env(0, 1, 1, f"debug-{os.getpid()}")
