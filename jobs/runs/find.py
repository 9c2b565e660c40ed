"""Finds a run by the path or name of its directory, and its submission."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, Submitted, read_json
from jobs.slurm import environment, query
from workloads.errors import did_you_mean


def find(name: str) -> RunDirectory:
    """The run directory at that path, or with that name in ./runs.

    Raises:
        CommandLineError: there is no such directory (suggests a close match), or it is not a run directory.
    """
    runs = Path.cwd() / "runs"
    if not name.strip():
        raise CommandLineError("'': is not a run directory (an unset shell variable?); give the path of one")
    for path in (Path(name).expanduser(), runs / name):
        try:
            if path.exists():
                break
        except OSError as error:  # too long a name
            raise CommandLineError(f"'{name}': {error.strerror}; give the path of a run directory") from None
    else:
        names = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
        close = did_you_mean(Path(name).name, names)
        if name.isdecimal():
            close = " (it looks like a job ID)"
        raise CommandLineError(f"'{name}': no such run directory, here or in ./runs{close}; give the path of one")
    run_dir = RunDirectory(path.absolute())
    if not run_dir.job.is_file():
        raise CommandLineError(f"'{name}': is not a run directory, because it has no job.json; give the path of one")
    return run_dir


def submission(run_dir: RunDirectory) -> Submitted | None:
    """The submission of a run. If sbatch's answer was lost, asks Slurm for the job's number and records it."""
    submitted = run_dir.submitted()
    if submitted is None and run_dir.script:
        job_id = query.find(run_dir.submitit, environment.for_queries(os.environ))
        if job_id:
            submitted = Submitted.now("slurm", job_id)
            run_dir.record_submission(submitted)
    return submitted


def why_not_submitted(run_dir: RunDirectory) -> str:
    """Why a run directory without a submission and without a result cannot be followed."""
    if (read_json(run_dir.job) or {}).get("executor") == "debug":
        return (
            f"{run_dir.path}: ran with --executor debug, inside the command that started it; there is no job to follow"
        )
    if run_dir.script:
        return (
            f"{run_dir.path}: sbatch could not tell whether it queued the job, and Slurm knows no job with its script; "
            "try again later, or submit it again with another --run-dir"
        )
    return (
        f"{run_dir.path}: has no submission.json, so its job was not submitted; submit it again with another --run-dir"
    )


def come_back(run_dir: RunDirectory, verb: str = "wait") -> str:
    """The command that follows a run again, with the same program name as this command, so that it can be pasted."""
    path = run_dir.path
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    program = sys.argv[0] if sys.argv and Path(sys.argv[0]).name in ("submit.py", "meshrun") else "submit.py"
    command = ["python", program] if program.endswith(".py") else [Path(program).name]
    return shlex.join([*command, verb, str(path)])
