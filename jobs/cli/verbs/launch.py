"""`submit.py script ...`, and each new run: prints a dry run, or submits and follows a job."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import executor, snapshot
from jobs.cli import dry_run, fit, interrupts, preparation
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.resolve import Resolved, imported_folders, resolve
from jobs.errors import CommandLineError, Interrupted, RunDirectoryError, SubmissionError
from jobs.run_dir import RunDirectory, keep_others_from_writing
from jobs.runs import index
from workloads.errors import is_of_file_system, refusal_of

Errors = type[BaseException] | tuple[type[BaseException], ...]
Undo = Callable[[Errors], contextlib.AbstractContextManager[None]]


def run(given: Options, console: Console) -> int:
    """Resolves the job and runs it.

    Returns:
        The exit code.

    Raises:
        UserError, WorkloadError: the job is invalid; nothing was started.
        JobFailed, Interrupted: the job that this command followed failed, or was interrupted.
    """
    if given.parallel is not None:
        many = "a script's arguments are its own" if given.script else "no setting has several values"
        raise CommandLineError(f"--parallel {given.parallel}: is for a sweep (lr=1e-3,3e-4 seed=1..4), and {many}")
    return go(resolve(given), given, console, keep_code)


def go(resolved: Resolved, given: Options, console: Console, keep: Callable[[Resolved, Options], Resolved]) -> int:
    """Runs a job in a new run directory, or shows what would happen.

    Args:
        resolved: the job.
        given: the command line.
        console: where it is shown.
        keep: fills the run directory with the code and the manifest.

    Returns:
        The exit code.

    Raises:
        UserError, WorkloadError, JobFailed, Interrupted: as `run`.
    """
    spec = resolved.spec
    plan = preparation.plan(resolved.entry, resolved.config)
    if given.dry_run:
        return show(resolved, plan, console)
    resolved = ask_slurm(resolved, console)
    new = [path for path in (spec.run_dir, *spec.run_dir.parents) if not path.exists()]
    keep_others_from_writing()
    run_dir = RunDirectory.create(spec.run_dir)
    undo = functools.partial(emptied_on, run_dir=run_dir, new=new, console=console)
    with undo(BaseException):
        run_dir.describe(spec)
        if fault := run_dir.fault():
            raise RunDirectoryError(f"{fault}; make room there, or give another --run-dir")
        resolved = keep(resolved, given)
        prepared = None if plan is None else prepare(resolved, plan, console)
    if prepared is not None:
        resolved = replace(resolved, announcements=(*resolved.announcements, f"prepared: {prepared}"))
        console.facts["prepared"] = prepared
    return start(resolved, run_dir, undo, console, given.wait)


def keep_code(resolved: Resolved, given: Options, was: Mapping[str, Any] | None = None) -> Resolved:
    """Takes the run's own copy of the code as it is now, and writes its manifest.

    Args:
        resolved: the job.
        given: the command line.
        was: the manifest of an attempt that this one follows, or of a run that it repeats.

    Returns:
        The job, with a line about what is not in the copy.
    """
    from jobs.cli import manifest  # late: a dry run does without

    spec = resolved.spec
    folders = imported_folders(spec.workload, spec.import_path, resolved.config)
    taken = snapshot.take(spec.code, folders, RunDirectory(spec.run_dir).code) if spec.code else None
    manifest.write(resolved, given, folders, taken, was)
    said = [str(taken)] if taken is not None and str(taken) else []
    return replace(resolved, announcements=(*resolved.announcements, *said))


def show(resolved: Resolved, plan: str | None, console: Console) -> int:
    """Prints what would happen; the exit code."""
    dry_run.show(resolved, plan, console)
    gc.freeze()  # otherwise Python's last garbage collection takes a tenth of the whole command's time
    return 0


def ask_slurm(resolved: Resolved, console: Console, array: str = "") -> Resolved:
    """The job, with what Slurm says of when it would start; a local one, when what it comes after is done.

    Raises:
        CommandLineError: what it comes after has failed.
        SubmissionError: Slurm would refuse it.
        ResourceError: its ranks would see no GPU.
    """
    if resolved.spec.executor != "slurm":
        if resolved.spec.after:
            from jobs.cli import after  # late: few lines have it

            after.wait(resolved.spec.after, console)
        return resolved
    reply = executor.check_slurm(executor.render(resolved.spec, resolved.cluster, array))
    warnings = fit.check_torch_build(resolved.spec, resolved.cluster, os.environ)
    return replace(resolved, announcements=(*resolved.announcements, *warnings, *([reply] if reply else [])))


def start(resolved: Resolved, run_dir: RunDirectory, undo: Undo, console: Console, wait: bool | None) -> int:
    """Starts a job whose run directory describes it, and follows it where that is asked for.

    Args:
        resolved: the job.
        run_dir: its directory.
        undo: `with undo(errors):` leaves the directory as it was before this command if one of them is raised inside.
        console: where it is shown.
        wait: what --wait or --no-wait says.

    Returns:
        The exit code.
    """
    spec = resolved.spec
    console.facts["run_dir"] = str(spec.run_dir)
    index.add([spec.run_dir])
    if spec.executor == "slurm":
        return _queue(resolved, run_dir, undo, console, wait=bool(wait))
    with undo(BaseException):
        _announce(resolved, console)
    if spec.executor == "debug":
        from jobs.cli import debug

        return debug.run(spec, console)
    if wait is False:
        return _let_go(resolved, run_dir, console)
    from jobs.cli import owned

    return owned.run(spec, resolved.cluster, console)


def prepare(resolved: Resolved, plan: str, console: Console) -> str | None:
    """Lets the workload prepare its data in a process of its own.

    Returns:
        The line that `prepare` returned, if any.
    """
    started = None
    try:
        with interrupts.held():
            started = preparation.Preparation(resolved.entry, resolved.spec, plan, console.pass_on)
        return started.outcome()
    except BaseException:
        interrupts.ignore()
        raise
    finally:
        with interrupts.held():
            if started is not None:
                started.end()


def _announce(resolved: Resolved, console: Console) -> None:
    for line in resolved.announcements:
        console.say(line)
    console.say(f"run directory: {resolved.spec.run_dir}")


def _queue(resolved: Resolved, run_dir: RunDirectory, undo: Undo, console: Console, wait: bool) -> int:
    """Submits a Slurm job, and follows it with --wait."""
    from jobs.cli import watch
    from jobs.cli.start import start_slurm

    submitted = None
    try:
        interrupts.check()
        with interrupts.held(), undo((SubmissionError, OSError)):
            submitted = start_slurm(resolved.spec, resolved.cluster, console)
        _announce(resolved, console)  # not earlier, so that a refusal stays one line
        console.say(f"submitted job {submitted.job_id}")
        if not wait:
            return watch.leave(run_dir, console)
    except Interrupted as interruption:
        if submitted is None:
            raise
        return watch.detached(run_dir, submitted, console, interruption)
    return watch.watch(run_dir, submitted, console)


def _let_go(resolved: Resolved, run_dir: RunDirectory, console: Console) -> int:
    """Starts a local job that keeps running when this command ends."""
    from jobs.cli import watch
    from jobs.cli.start import start_local

    submitted = None
    try:
        interrupts.check()
        with interrupts.held():
            _, submitted = start_local(resolved.spec, resolved.cluster, console, owned=False)
            console.facts["job_id"] = submitted.job_id
        console.say(f"started as process {submitted.job_id}; it keeps running without this terminal")
        return watch.leave(run_dir, console)
    except Interrupted as interruption:
        if submitted is None:
            raise
        return watch.detached(run_dir, submitted, console, interruption)


@contextlib.contextmanager
def emptied_on(
    error: Errors,
    run_dir: RunDirectory,
    new: Sequence[Path],
    console: Console,
) -> Iterator[None]:
    """Empties a run directory in which nothing was started, so that a corrected command can use it again.

    Args:
        error: the exceptions after which nothing was started.
        run_dir: the directory; a symbolic link or mount point that existed before is kept.
        new: the directory and its parents, innermost first, as far as they did not exist before.
        console: no longer reports the directory.
    """
    try:
        yield
    except error as mistake:
        # Now, while the file system is still as full as it was.
        line = refusal_of(mistake) if isinstance(mistake, OSError) and is_of_file_system(mistake) else ""
        console.facts.pop("run_dir", None)
        with contextlib.suppress(OSError):  # for example if another run uses the directory by now
            for path in run_dir.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            for path in new:
                path.rmdir()
        if line:
            raise RunDirectoryError(line) from mistake
        raise
