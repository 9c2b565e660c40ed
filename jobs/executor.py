"""JobSpec + ClusterConfig -> submitit parameters and the exact submission (pure) -> a submitted job."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cluster import ClusterConfig
from jobs.errors import JobFailed, SubmissionError
from jobs.records import RunDirectory
from jobs.spec import JobSpec

ENTRY = Path(__file__).with_name("entry.py")


@dataclass(frozen=True)
class Submission:
    """What is handed to submitit, and what that comes to."""

    parameters: dict[str, Any]
    """For submitit's executor."""
    text: str
    """The batch script (slurm), or the command (local, debug)."""
    env: dict[str, str]
    """Variables that every rank gets."""


def rank_env(spec: JobSpec) -> dict[str, str]:
    """Variables of every rank: the user's, and the thread counts that libraries read when they are imported."""
    threads = {name: str(spec.threads_per_rank) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # Bursts of connections make gloo look names up; a slow name server would stall each for 5 s.
    return {"RES_OPTIONS": "timeout:1 attempts:1", **spec.env, **threads, "OPENBLAS_NUM_THREADS": "1"}


def render(spec: JobSpec, cluster: ClusterConfig) -> Submission:
    """The submission of a job: pure, so that `--dry-run` prints exactly what would happen."""
    env = rank_env(spec)
    if spec.executor == "slurm":
        parameters = slurm_parameters(spec, cluster, env)
        return Submission(parameters, _sbatch_text(spec, parameters), env)
    if spec.executor == "debug":
        return Submission({}, "one rank in this process", env)
    folder = RunDirectory(spec.run_dir).submitit
    shape = {"nodes": spec.resources.nodes, "tasks_per_node": spec.resources.gpus_per_node}
    return Submission({**shape, **_time(spec)}, shlex.join(_entry_command(folder)), env)


def slurm_parameters(spec: JobSpec, cluster: ClusterConfig, env: dict[str, str]) -> dict[str, Any]:
    """submitit's parameters for a Slurm job, in sbatch's own names."""
    resources = spec.resources
    parameters: dict[str, Any] = {
        "job_name": spec.name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.gpus_per_node,
        "gpus_per_node": resources.gpus_per_node,
        "stderr_to_stdout": True,
        # A TP group of consecutive ranks must lie within a host, whatever SLURM_DISTRIBUTION is inherited.
        # One dead rank ends all. srun does not inherit --cpus-per-task since 22.05.
        "srun_args": ["--distribution=block", "--kill-on-bad-exit=1", "--export=ALL"],
        "additional_parameters": {"distribution": "block", "requeue": True, "export": "ALL"},
        "setup": [
            *cluster.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in sorted(env.items())),
        ],
    }
    if resources.time_min is not None:
        parameters["time"] = resources.time_min
    for name in ("partition", "account", "qos"):
        value = getattr(resources, name)
        if value is not None:
            parameters[name] = value
    if resources.cpus_per_gpu is not None:
        parameters["cpus_per_task"] = resources.cpus_per_gpu
        parameters["srun_args"].append(f"--cpus-per-task={resources.cpus_per_gpu}")
    if resources.mem_gb_per_gpu is not None:
        parameters["mem"] = f"{math.ceil(resources.mem_gb_per_gpu * resources.gpus_per_node * 1024)}M"
    return parameters


def _time(spec: JobSpec) -> dict[str, int]:
    return {} if spec.resources.time_min is None else {"timeout_min": spec.resources.time_min}


def _entry_command(folder: Path) -> list[str]:
    """What starts a process of the job: the supervisor of a local one, each task of a Slurm one."""
    return [sys.executable, "-u", str(ENTRY), str(folder)]


def _sbatch_text(spec: JobSpec, parameters: dict[str, Any]) -> str:
    # submitit's own renderer, private but the only one; its version is bounded in pyproject.toml.
    from submitit.slurm.slurm import _make_sbatch_string

    folder = RunDirectory(spec.run_dir).submitit
    # Left to itself submitit asks for 5 minutes and a wckey; a job that does not say gets what its partition gives.
    return _make_sbatch_string(
        command=shlex.join(_entry_command(folder)), folder=folder, **{"time": None, "wckey": None, **parameters}
    )


def check_slurm() -> None:
    """Refuses a Slurm job where there is no Slurm, before anything is written.

    Raises:
        SubmissionError: sbatch or srun is not on the PATH.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise SubmissionError(
            f"--executor slurm: {' and '.join(missing)} not found on PATH; submit from a login node, "
            "or use --executor local"
        )


def submit(spec: JobSpec, cluster: ClusterConfig, *, owned: bool) -> Any:
    """Hands the job to submitit; the run directory exists already.

    Args:
        spec: the job.
        cluster: its cluster.
        owned: local jobs only: whether the job ends with this process.

    Returns:
        submitit's job: a LocalJob or a SlurmJob.

    Raises:
        SubmissionError: sbatch refused, in its own words; nothing is queued.
        JobFailed: something broke after sbatch was called.
    """
    from jobs.job import Job

    submission = render(spec, cluster)
    run = RunDirectory(spec.run_dir)
    job = Job(spec)
    if spec.executor == "local":
        from jobs.local import LocalExecutor, Supervisor

        command = _entry_command(run.submitit)
        local = LocalExecutor(run.submitit, command, run.attempt(0).supervisor_log, owned, submission.env)
        local.update_parameters(**({"timeout_min": spec.resources.time_min} if spec.resources.time_min else {}))
        return local.submit(Supervisor(job))
    assert spec.executor == "slurm"
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    class _Executor(SlurmExecutor):
        @classmethod
        def name(cls) -> str:
            return "slurm"

        @property
        def _submitit_command_str(self) -> str:
            return shlex.join(_entry_command(self.folder))

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return submission.text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            executor = _Executor(run.submitit)
            executor.update_parameters(**submission.parameters)
            return executor.submit(job)
        except FailedJobError as error:
            words = " ".join(str(error).split())
            raise SubmissionError(f"sbatch refused the job: {words or type(error).__name__}") from None
        except (RuntimeError, OSError) as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise JobFailed(
                f"the submission broke off ({words}); see with squeue whether the job is queued, and cancel it if it is"
            ) from error


def debug_env(spec: JobSpec) -> dict[str, str]:
    """The variables of the one rank that the debug executor runs in this process."""
    from jobs.topology import local_env

    return local_env(0, 1, 1, f"debug-{os.getpid()}")
