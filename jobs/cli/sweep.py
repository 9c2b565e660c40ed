"""A line with several values per setting (`lr=1e-3,3e-4 seed=1..4`): a run for each combination, all of them queued.

On Slurm they are one array; on this machine, a queue in this command (`jobs/cli/sweep_queue.py`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jobs import executor, machine, snapshot
from jobs.cli import dry_run, interrupts, manifest, preparation, sweep_queue, sweep_table
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.resolve import Resolved, imported_folders, resolve
from jobs.cli.verbs import launch
from jobs.errors import USER_ERRORS, CommandLineError, Interrupted, RunDirectoryError, SubmissionError
from jobs.run_dir import RunDirectory, default_run_dir, keep_others_from_writing
from jobs.runs import index, sweep
from jobs.runs.find import come_back
from jobs.runs.sweep import Sweep, words_of
from jobs.slurm import environment, query
from workloads.input_files import expanded

Point = Mapping[str, str]


def run(given: Options, points: Sequence[Point], console: Console) -> int:
    """Runs a sweep, or shows what would happen.

    Args:
        given: the command line.
        points: the settings of each point that have several values.
        console: where it is shown.

    Returns:
        The exit code: 0 if all points are done, or queued and not waited for.

    Raises:
        UserError, WorkloadError: the sweep, or one of its points, cannot work; nothing was started.
    """
    folder = default_run_dir(f"{given.words[0].partition(':')[0]}-sweep")
    if given.run_dir is not None:
        folder = expanded(given.run_dir).absolute()
    jobs = _resolved(given, points, folder)
    first = jobs[0]
    slurm = first.spec.executor == "slurm"
    parallel = min(len(jobs), int(given.parallel)) if given.parallel is not None else len(jobs) if slurm else 1
    array = f"0-{len(jobs) - 1}" + (f"%{parallel}" if parallel < len(jobs) else "") if slurm else ""
    said = dict.fromkeys(line.replace(str(one.spec.run_dir), str(folder)) for one in jobs for line in one.announcements)
    whole = replace(first, spec=first.spec.model_copy(update={"run_dir": folder}), announcements=tuple(said))
    plans = [preparation.plan(one.entry, one.config) for one in jobs]
    seats = [] if slurm else sweep_queue.seats(jobs, parallel, machine.gpu_count(os.environ))
    if len(seats) > 1:  # each would bind its ranks to the first of this machine's CPUs
        jobs = [replace(one, spec=one.spec.model_copy(update={"cpu_binding": "none"})) for one in jobs]
    if given.dry_run:
        dry_run.show(
            replace(first, announcements=whole.announcements),
            plans[0],
            console,
            dry_run.OfSweep(points, whole.spec, array),
        )
        return 0
    if not slurm and given.wait is False:
        raise CommandLineError("--no-wait: a sweep on this machine is a queue in this command; leave it out")
    if slurm and (most := query.most_points(environment.for_queries(os.environ))) is not None and most < len(jobs):
        raise SubmissionError(
            f"a sweep of {len(jobs)} points: this Slurm takes arrays of at most {most} (MaxArraySize)"
        )
    whole = launch.ask_slurm(whole, console, array)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    keep_others_from_writing()
    undo = functools.partial(launch.emptied_on, run_dir=RunDirectory.create(folder), new=new, console=console)
    with undo(BaseException):
        made, lines = _make(jobs, plans, points, given, whole, array, console)
    whole = replace(whole, announcements=(*whole.announcements, *dict.fromkeys(lines)))
    console.facts["sweep"] = str(folder)
    index.add(run_dir.path for run_dir in made.runs())
    if slurm:
        return _queue(whole, made, array, undo, console, wait=bool(given.wait))
    with undo(BaseException):
        _announce(whole, made, parallel, console)
    return sweep_queue.run(made, jobs, seats, console)


def _resolved(given: Options, points: Sequence[Point], folder: Path) -> list[Resolved]:
    """The job of each point.

    Raises:
        UserError, WorkloadError: one of them is invalid.
    """
    if given.executor == "debug":
        raise CommandLineError("--executor debug: runs one rank in this process, and a sweep is several runs")
    RunDirectory.check(folder)
    words = [word for word in given.words if word.partition("=")[0].strip() not in points[0]]
    jobs: list[Resolved] = []
    for number, point in enumerate(points):
        line = replace(given, words=[*words, *(f"{key}={text}" for key, text in point.items())])
        try:
            jobs.append(resolve(replace(line, run_dir=str(folder / str(number)), after=[] if jobs else given.after)))
        except USER_ERRORS as mistake:
            if not jobs:  # it may not be the point's
                raise
            raise type(mistake)(f"point {number} ({words_of(point)}): {mistake}") from None
    after = {"after": jobs[0].spec.after, "after_jobs": jobs[0].spec.after_jobs}  # Slurm was asked once
    return [replace(one, spec=one.spec.model_copy(update=after)) for one in jobs]


def _make(
    jobs: Sequence[Resolved],
    plans: Sequence[str | None],
    points: Sequence[Point],
    given: Options,
    whole: Resolved,
    array: str,
    console: Console,
) -> tuple[Sweep, list[str]]:
    """Makes the run directories in the sweep's folder, and what they share; lines about that.

    Raises:
        RunDirectoryError, WorkloadError: that cannot be done.
    """
    folder, code = whole.spec.run_dir, RunDirectory(whole.spec.run_dir).code
    if fault := RunDirectory(folder).fault():
        raise RunDirectoryError(f"{fault}; make room there, or give another --run-dir")
    folders = imported_folders(whole.spec.workload, whole.spec.import_path, whole.config)
    taken = snapshot.take(whole.spec.code, folders, code) if whole.spec.code else None
    lines = [str(taken)] if taken is not None and str(taken) else []
    submission = executor.render(whole.spec, whole.cluster, array)
    asked = manifest.ask(whole.spec, folders)
    for one, plan in zip(jobs, plans, strict=True):
        run_dir = RunDirectory.create(one.spec.run_dir)
        run_dir.describe(one.spec)
        if taken is not None:
            run_dir.code.symlink_to(code)  # not a relative one, which would lead elsewhere once `resume` has moved it
        manifest.write(one, given, folders, taken, asked=asked, submission=submission if array else None)
        prepared = None if plan is None else launch.prepare(one, plan, console)
        lines += [f"prepared: {prepared}"] if prepared else []
    return sweep.write(folder, points, workload=whole.spec.workload, executor=whole.spec.executor, array=array), lines


def _announce(whole: Resolved, made: Sweep, parallel: int, console: Console) -> None:
    for line in whole.announcements:
        console.say(line)
    console.say(f"sweep of {len(made.points)} points, {parallel} at once: {made.path}")


def _queue(whole: Resolved, made: Sweep, array: str, undo: launch.Undo, console: Console, wait: bool) -> int:
    """Submits the array, and follows it with --wait."""
    from jobs.cli.start import start_slurm

    submitted = None
    try:
        interrupts.check()
        with interrupts.held(), undo((SubmissionError, OSError)):
            submitted = start_slurm(whole.spec, whole.cluster, console, array, made.runs())
        _announce(whole, made, int(array.partition("%")[2] or len(made.points)), console)
        console.say(f"submitted job {submitted.job_id}, an array of {array}")
        if not wait:
            console.say(f"  follow it: {come_back(RunDirectory(made.path))}")
            console.say(f"  see it:    {come_back(RunDirectory(made.path), 'status')}")
            console.say(f"  end it:    {come_back(RunDirectory(made.path), 'cancel')}")
            console.finish({"status": "submitted", "exit_code": 0})
            return 0
    except Interrupted as interruption:
        if submitted is None:
            raise
        return sweep_table.detached(made, console, interruption)
    return sweep_table.follow(made, console)
