"""`--after RUN`: a job starts when other runs are done. On Slurm it depends on their jobs; here the command waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.cli.console import Console
from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory
from jobs.runs.find import come_back, find_all
from jobs.runs.overview import COMPLETED, Overview, overviews
from workloads.errors import first_few

LOOK_EVERY_S, ASK_EVERY_S = 1.0, 10.0
"""Seconds between two looks at the runs that are waited for; the longer ones if Slurm is asked."""


class After(NamedTuple):
    runs: tuple[str, ...] = ()
    """The directories of the runs that have not ended."""
    jobs: tuple[str, ...] = ()
    """Their jobs in Slurm, if this one is one, too."""
    lines: tuple[str, ...] = ()


def of_line(names: Sequence[str], executor: str) -> After:
    """What a job has to wait for.

    Args:
        names: of runs and sweeps, as --after has them.
        executor: of the job.

    Raises:
        CommandLineError: there is no such run, it has ended and is not done, or it cannot be waited for.
    """
    if not names:
        return After()
    seen = overviews(find_all(names))
    left = [one for one in seen if not _is_done(one)]
    for one in left:
        if executor == "slurm" and one.executor != "slurm":
            raise CommandLineError(
                f"--after: {one.name} is no Slurm job, and none can wait for it; submit this one when it is done"
            )
    called = first_few([one.name for one in left], 4)
    line = (
        f"starts when {called} {'are' if len(left) > 1 else 'is'} done (--after)" if left else "--after: done already"
    )
    jobs = tuple(one.job_id for one in left) if executor == "slurm" else ()
    return After(tuple(str(one.path) for one in left), jobs, (line,))


def wait(runs: Sequence[str], console: Console) -> None:
    """Returns when all runs are done; nothing has a deadline here.

    Raises:
        CommandLineError: one of them has ended otherwise.
    """
    shown = ""
    while left := [one for one in overviews([RunDirectory(Path(run)) for run in runs]) if not _is_done(one)]:
        line = f"waiting for {first_few([f'{one.name} ({one.state})' for one in left], 4)}; Ctrl-C ends the wait"
        if line != shown:
            console.say(line)
            shown = line
        time.sleep(ASK_EVERY_S if any(one.executor == "slurm" for one in left) else LOOK_EVERY_S)


def _is_done(one: Overview) -> bool:
    """Whether a run is done; False while it may get there."""
    if one.is_alive is False and one.state != COMPLETED:
        why = come_back(RunDirectory(one.path), "explain")
        raise CommandLineError(
            f"--after: {one.name} has ended and is not done ({one.state}), so nothing starts; why: {why}"
        )
    if one.is_alive is None:
        raise CommandLineError(f"--after: it is not known whether {one.name} has ended: {one.reason}; try again later")
    return one.is_alive is False
