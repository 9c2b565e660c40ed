"""`submit.py wait RUN`: follows a submitted job, or prints how it ended."""

from __future__ import annotations

from jobs.cli import sweep_table
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.report import report_end
from jobs.cli.watch import watch
from jobs.errors import CommandLineError
from jobs.runs.find import look, submission, why_not_submitted
from jobs.runs.sweep import Sweep


def run(given: Options, console: Console) -> int:
    """Follows the job of a run directory until it ends.

    Returns:
        The exit code of the job, or 130 if the wait was interrupted and the job keeps running.

    Raises:
        CommandLineError: there is no such run, or it has no job to wait for.
    """
    run_dir = look(given.run)
    if isinstance(run_dir, Sweep):
        return sweep_table.follow(run_dir, console)
    submitted = submission(run_dir)
    if submitted is None:
        record = run_dir.recorded()
        if record is None:
            raise CommandLineError(why_not_submitted(run_dir))
        return report_end(record, console, record.get("seconds"), run_dir)
    return watch(run_dir, submitted, console, from_the_start=False)
