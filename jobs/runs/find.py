"""Finds a run by its path, job ID, or a part of its name, and its submission."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, Submitted, read_json
from jobs.runs import index, sweep
from jobs.runs.sweep import Sweep
from jobs.slurm import environment, query
from workloads.errors import did_you_mean, first_few
from workloads.input_files import expanded

LAST = "last"
"""The name of the run that was started or resumed last."""

typed_in: Path | None = None
"""Where this command was typed, if it has changed its directory since."""


def find(name: str = LAST) -> RunDirectory:
    """The run with that path, name in ./runs, job ID, or part of a name that no other run has.

    Raises:
        CommandLineError: there is no such run (suggests a close match), or there are several, as in a sweep.
    """
    found = look(name)
    if isinstance(found, Sweep):
        one = f"{found.name}/0 to {found.name}/{len(found.points) - 1}"
        raise CommandLineError(f"'{name}' is a sweep of {len(found.points)} points; name one of them, {one}")
    return found


def find_all(names: Sequence[str], every: bool = False) -> list[RunDirectory]:
    """The runs with those names, each once; of a sweep, the run of each point that counts.

    Args:
        names: of runs and sweeps.
        every: also a point's earlier runs, in whose place newer ones are.

    Raises:
        CommandLineError: there is no such run, or a name means several.
    """
    runs: list[RunDirectory] = []
    for found in map(look, names):
        if isinstance(found, Sweep):
            runs += found.every_run() if every else found.runs()
        else:
            runs.append(found)
    return list(dict.fromkeys(runs))


def look(name: str = LAST) -> RunDirectory | Sweep:
    """As `find`, but a name may also mean a sweep: its path, its name or a part of it, or its array's job ID.

    Raises:
        CommandLineError: there is no such run, or there are several.
    """
    if not name.strip():
        raise CommandLineError("'': is not a run (an unset shell variable?); give the path of a run directory")
    path = expanded(name)
    try:
        is_there = path.exists()
    except OSError as error:  # too long a name
        raise CommandLineError(f"'{name}': {error.strerror}; give the path of a run directory") from None
    run_dir = RunDirectory(path.absolute())
    if is_there and run_dir.job.is_file():
        return run_dir
    if is_there and (there := sweep.read(run_dir.path)) is not None:
        return there
    is_point = re.fullmatch(r"[^/]+/\d+(\.\d+)?", name)
    found = _named(name, index.runs()) if len(path.parts) == 1 or is_point else []
    if isinstance(found, Sweep):
        return found
    if len(found) > 1:
        names = first_few([run.name for run in found], 4)
        raise CommandLineError(f"'{name}': {len(found)} runs have that in their names: {names}; give more of the name")
    if found:
        return found[0]
    if is_there or (Path("runs") / name).exists():
        raise CommandLineError(f"'{name}': is not a run directory, because it has no job.json; give the path of one")
    if name == LAST:
        raise CommandLineError(f"'{LAST}': there is no run, neither in ./runs nor in {index.path()}; start one first")
    if _JOB_ID.fullmatch(name):
        raise CommandLineError(f"'{name}': no run known here has that job ID; give the path of its run directory")
    close = did_you_mean(path.name, [run.name for run in index.runs()])
    raise CommandLineError(f"'{name}': no such run, here or in ./runs{close}; give the path of a run directory")


_JOB_ID = re.compile(r"\d+(_\d+)?", re.ASCII)


def _named(name: str, runs: Sequence[RunDirectory]) -> list[RunDirectory] | Sweep:
    """Those of `runs`, newest first, that a name means; of several of that very name, the newest."""
    if name == LAST:
        return _as_started(runs[0]) if runs else []
    if exact := [run for run in runs if run.name == name]:
        here = [run for run in exact if run.path.is_relative_to(Path("runs").absolute())]
        return (here or exact)[:1]
    if _JOB_ID.fullmatch(name):
        array, _, element = name.partition("_")
        for run in runs:
            job_id = "" if (submitted := run.submitted()) is None else submitted.job_id
            if job_id == name:
                return [run]
            if job_id.startswith(f"{array}_") and (whole := sweep.sweep_of(run)) is not None:
                point = whole.first_run(int(element or 0))  # which another job may go on with since
                return whole if not element else [point] if point.job.is_file() else []
    if "/" in name:
        return [run for run in runs if run.sweep is not None and run.name.endswith(name)]
    found = [run for run in runs if name in (run.path if run.sweep is None else run.path.parent).name]
    folders = {run.path.parent for run in found}
    whole = sweep.sweep_of(found[0]) if len(folders) == 1 else None
    return found if whole is None else whole


def _as_started(run: RunDirectory) -> list[RunDirectory] | Sweep:
    """The run, or the sweep that was started with it, unless it alone was started since."""
    whole = sweep.sweep_of(run)
    if whole is None or "." in run.path.name or run.job.stat().st_mtime_ns > whole.file.stat().st_mtime_ns:
        return [run]
    return whole


def submission(run_dir: RunDirectory, *, writes: bool = True) -> Submitted | None:
    """The submission of a run. If sbatch's answer was lost, asks Slurm for the job's number, and records it."""
    submitted = run_dir.submitted()
    if submitted is None and (script := run_dir.script_file) is not None:
        element = run_dir.path.name if script.parent != run_dir.submitit else ""
        job_id = query.find(script.parent, environment.for_queries(os.environ), element)
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
    if run_dir.sweep is not None:
        return (
            f"{run_dir.path}: a point that its sweep has not started, or not yet; once the sweep has ended: "
            f"{come_back(run_dir, 'resubmit')}"
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
