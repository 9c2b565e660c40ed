"""`submit.py WORKLOAD ...`: one run, or a sweep where a setting has several values."""

from __future__ import annotations

from jobs import settings
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.verbs import launch


def run(given: Options, console: Console) -> int:
    """Runs what the line describes.

    Returns:
        The exit code.

    Raises:
        UserError, WorkloadError, JobFailed, Interrupted: as `launch.run`.
    """
    points = settings.sweep(given.words[1:])
    if points is None:
        return launch.run(given, console)
    from jobs.cli import sweep  # late: few lines are one

    return sweep.run(given, points, console)
