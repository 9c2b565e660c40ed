"""Finds a run by its path, job ID, or a part of its name, and its submission."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, Submitted, read_json
from jobs.runs import index
from jobs.slurm import environment, query
from workloads.errors import did_you_mean, first_few

LAST = "last"
"""The name of the run that was started or resumed last."""

typed_in: Path | None = None
"""Where this command was typed, if it has changed its directory since."""


def find(name: str = LAST) -> RunDirectory:
    """The run with that path, name in ./runs, job ID, or part of a name that no other run has.

    Raises:
        CommandLineError: there is no such run (suggests a close match), or there are several.
    """
    if not name.strip():
        raise CommandLineError("'': is not a run (an unset shell variable?); give the path of a run directory")
    path = Path(name).expanduser()
    try:
        is_there = path.exists()
    except OSError as error:  # too long a name
        raise CommandLineError(f"'{name}': {error.strerror}; give the path of a run directory") from None
    run_dir = RunDirectory(path.absolute())
    if is_there and run_dir.job.is_file():
        return run_dir
    found = _named(name, index.runs()) if len(path.parts) == 1 else []
    if len(found) > 1:
        names = first_few([str(run.path.name) for run in found], 4)
        raise CommandLineError(f"'{name}': {len(found)} runs have that in their names: {names}; give more of the name")
    if found:
        return found[0]
    if is_there or (Path("runs") / name).exists():
        raise CommandLineError(f"'{name}': is not a run directory, because it has no job.json; give the path of one")
    if name == LAST:
        raise CommandLineError(f"'{LAST}': there is no run, neither in ./runs nor in {index.path()}; start one first")
    if name.isdecimal():
        raise CommandLineError(f"'{name}': no run known here has that job ID; give the path of its run directory")
    close = did_you_mean(path.name, [run.path.name for run in index.runs()])
    raise CommandLineError(f"'{name}': no such run, here or in ./runs{close}; give the path of a run directory")


def _named(name: str, runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """Those of `runs`, newest first, that a name means; of several of that very name, the newest."""
    if name == LAST:
        return [*runs[:1]]
    if exact := [run for run in runs if run.path.name == name]:
        here = [run for run in exact if run.path.parent == Path("runs").absolute()]
        return (here or exact)[:1]
    if name.isdecimal():
        for run in runs:
            if (submitted := run.submitted()) is not None and submitted.job_id == name:
                return [run]
    return [run for run in runs if name in run.path.name]


def submission(run_dir: RunDirectory, *, writes: bool = True) -> Submitted | None:
    """The submission of a run. If sbatch's answer was lost, asks Slurm for the job's number, and records it."""
    submitted = run_dir.submitted()
    if submitted is None and run_dir.script:
        job_id = query.find(run_dir.submitit, environment.for_queries(os.environ))
        if job_id:
            submitted = Submitted.now("slurm", job_id)
            if writes:
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
    path, here = run_dir.path, typed_in or Path.cwd()
    if path.is_relative_to(here):
        path = path.relative_to(here)
    program = sys.argv[0] if sys.argv and Path(sys.argv[0]).name in ("submit.py", "meshrun") else "submit.py"
    command = ["python", program] if program.endswith(".py") else [Path(program).name]
    return shlex.join([*command, verb, str(path)])
