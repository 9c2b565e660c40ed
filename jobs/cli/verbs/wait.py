"""`submit.py wait RUN`: follows a job that was left to itself, or says how it ended."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from jobs.cli import follow
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.errors import CommandLineError, did_you_mean
from jobs.run_dir import RunDirectory, Submitted, read_json
from jobs.slurm import environment, query

USE = "write submit.py wait RUN [--json]"


def run(given: Options, console: Console) -> int:
    """Follows the job of a run directory to its end.

    Returns:
        The exit code: the job's, or 130 where the wait was interrupted and the job left to itself.

    Raises:
        CommandLineError: there is no such run, or nothing to wait for.
    """
    for name, value in vars(given).items():
        if name not in ("words", "as_json") and value not in (None, [], False):
            raise CommandLineError(f"--{name.replace('_', '-')} means nothing to wait; {USE}")
    if given.wait is False:
        raise CommandLineError(f"--no-wait means nothing to wait; {USE}")
    names = given.words[1:]
    if len(names) != 1:
        raise CommandLineError(f"wait takes one run directory, {len(names) or 'none'} were given; {USE}")
    run_dir = find(names[0])
    submitted = run_dir.submitted()
    if submitted is None and run_dir.script:
        submitted = _look_for(run_dir)
    if submitted is None:
        if (record := run_dir.recorded()) is not None:
            return follow.report_end(record, console, record.get("seconds"))
        executor = (read_json(run_dir.job) or {}).get("executor")
        if executor == "debug":
            raise CommandLineError(f"{run_dir.path}: ran with --executor debug, in its own command line")
        if run_dir.script:
            raise CommandLineError(
                f"{run_dir.path}: sbatch could not say whether it queued the job, and Slurm names none with its "
                "script; look again later, or submit it again with another --run-dir"
            )
        raise CommandLineError(f"{run_dir.path}: has no submission.json: it was not submitted from here")
    return follow.watch(run_dir, submitted, console, from_the_start=False)


def _look_for(run_dir: RunDirectory) -> Submitted | None:
    """The Slurm job of a run directory whose number sbatch could not give, where Slurm has it by now."""
    job_id = query.find(run_dir.submitit, environment.for_queries(os.environ))
    if not job_id:
        return None
    submitted = Submitted("slurm", job_id, follow.now(), socket.gethostname())
    run_dir.record_submission(submitted)
    return submitted


def find(name: str) -> RunDirectory:
    """The run directory of that path, or of that name below ./runs.

    Raises:
        CommandLineError: there is none, with a close match; or it is something else.
    """
    runs = Path.cwd() / "runs"
    if not name.strip():
        raise CommandLineError(f"wait '': is empty (an unset shell variable?); {USE}")
    for path in (Path(name).expanduser(), runs / name):
        try:
            if path.exists():
                break
        except OSError as error:  # too long a name
            raise CommandLineError(f"wait {name}: {error.strerror}") from None
    else:
        there = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
        close = did_you_mean(Path(name).name, there)
        raise CommandLineError(f"wait {name}: no such run directory, here or below ./runs{close}")
    run_dir = RunDirectory(path.absolute())
    if not run_dir.job.is_file():
        raise CommandLineError(f"wait {name}: is not a run directory: there is no job.json in it")
    return run_dir
