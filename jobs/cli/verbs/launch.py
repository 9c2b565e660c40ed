"""`submit.py WORKLOAD ...`: a dry run's print, or a submitted job."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import socket
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from jobs import blame, executor, preparing
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.resolve import Resolved, resolve
from jobs.errors import Interrupted, JobFailed, RunDirectoryError, SubmissionError
from jobs.rank.numbering import mesh_table
from jobs.run_dir import RunDirectory, keep_others_from_writing, write_json
from jobs.settings import as_words
from jobs.spec import JobSpec
from workloads.base import WorkloadConfig


def run(given: Options, console: Console) -> int:
    """Resolves the job and runs it.

    Returns:
        The exit code.

    Raises:
        UserError, WorkloadError: before anything was written or started.
        JobFailed, Interrupted: a job that was waited for ended so.
    """
    resolved = resolve(given)
    spec = resolved.spec
    plan = preparing.plan(resolved.entry, resolved.config)
    if given.dry_run:
        _dry_run(resolved, plan, console)
        gc.freeze()  # nothing of it is garbage; Python's last collection would walk through it for a tenth of the time
        return 0
    if spec.executor == "slurm":
        words = executor.check_slurm(executor.render(spec, resolved.cluster))
        resolved = replace(resolved, announcements=(*resolved.announcements, *([words] if words else [])))
    new = [path for path in (spec.run_dir, *spec.run_dir.parents) if not path.exists()]
    keep_others_from_writing()
    run_dir = RunDirectory.create(spec.run_dir)
    with _emptied_on(BaseException, run_dir, new, console):
        run_dir.describe(spec)
        if fault := run_dir.fault():
            raise RunDirectoryError(f"{fault}; make room there, or give another --run-dir")
        prepared = None if plan is None else _prepare(resolved, plan, console)
    if prepared is not None:
        resolved = replace(resolved, announcements=(*resolved.announcements, f"prepared: {prepared}"))
        console.facts["prepared"] = prepared
    console.facts["run_dir"] = str(spec.run_dir)
    if spec.executor == "slurm":
        return _queue(resolved, run_dir, new, console, wait=bool(given.wait))
    with _emptied_on(BaseException, run_dir, new, console):
        _announce(resolved, console)
    if spec.executor == "debug":
        return _debug(spec, console)

    from jobs.cli import follow

    wait = given.wait is not False
    return follow.run(spec, resolved.cluster, console, wait=wait, total_steps=_total_steps(resolved.config))


def _prepare(resolved: Resolved, plan: str, console: Console) -> str | None:
    """Has the workload prepare its data, in a process of its own.

    Returns:
        The line that `prepare` returned, if it did.
    """
    preparation = None
    try:
        with interrupts.held():
            preparation = preparing.Preparation(resolved.entry, resolved.spec, plan, console.pass_on)
        return preparation.outcome()
    except BaseException:
        interrupts.ignore()
        raise
    finally:
        with interrupts.held():
            if preparation is not None:
                preparation.end()


def _announce(resolved: Resolved, console: Console) -> None:
    for line in resolved.announcements:
        console.say(line)
    console.say(f"run directory: {resolved.spec.run_dir}")


def _queue(resolved: Resolved, run_dir: RunDirectory, new: Sequence[Path], console: Console, wait: bool) -> int:
    """Submits a Slurm job, and follows it where that is asked for."""
    from jobs.cli import follow

    submitted = None
    try:
        with interrupts.held(), _emptied_on((SubmissionError, OSError), run_dir, new, console):
            submitted = follow.submit_slurm(resolved.spec, resolved.cluster, console)
        _announce(resolved, console)  # not before: a refusal stays one line
        console.say(f"submitted job {submitted.job_id}")
        if not wait:
            return follow.leave(run_dir, submitted, console)
    except Interrupted as interruption:
        if submitted is None:
            raise
        return follow.detached(run_dir, submitted, console, interruption)
    return follow.watch(run_dir, submitted, console)


def _total_steps(config: WorkloadConfig) -> int | None:
    steps = getattr(config, "steps", None)
    return steps if isinstance(steps, int) else None


@contextlib.contextmanager
def _emptied_on(
    error: type[BaseException] | tuple[type[BaseException], ...],
    run_dir: RunDirectory,
    new: Sequence[Path],
    console: Console,
) -> Iterator[None]:
    """Of a run directory in which nothing was started nothing stays behind: the corrected line can name it again.

    Args:
        error: what shows that nothing was started.
        run_dir: what was made; a symbolic link or a mount point, which was there before, stays.
        new: those of it and its parents that were not there before, innermost first.
        console: tells no more of it.
    """
    try:
        yield
    except error:
        console.facts.pop("run_dir", None)
        with contextlib.suppress(OSError):  # such as not empty: another run is there by now
            for path in run_dir.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            for path in new:
                path.rmdir()
        raise


def _dry_run(resolved: Resolved, plan: str | None, console: Console) -> None:
    spec = resolved.spec
    submission = executor.render(spec, resolved.cluster)
    hosts = [f"host{node}" for node in range(spec.resources.nodes)]
    console.say("dry run: nothing is started or written\n")
    for line in resolved.announcements:
        console.say(line)
    if plan is not None:
        console.say(f"prepare: {plan}")
    console.say(f"run directory: {spec.run_dir}\n")
    console.say("settings:")
    words = " ".join(as_words(spec.settings))
    console.say(_indent(textwrap.fill(words, 110, break_long_words=False, break_on_hyphens=False)) + "\n")
    console.say(f"mesh: {resolved.mesh}, on {spec.resources.shape} ranks")
    console.say(_indent(mesh_table(resolved.mesh, hosts)) + "\n")
    if spec.executor != "slurm":  # else both are in the script
        console.say("environment of every rank:")
        console.say(_indent("\n".join(f"{name}={value}" for name, value in sorted(submission.env.items()))) + "\n")
        console.say("submission parameters:")
        console.say(_indent(yaml.safe_dump(submission.parameters or "none", sort_keys=False)) + "\n")
    console.say("submission:")
    console.say(_indent(submission.text))
    if not console.as_json:
        return
    console.finish(
        {
            "status": "dry-run",
            "exit_code": 0,
            "job": spec.model_dump(mode="json"),
            "prepare": plan,
            "mesh": {
                "names": resolved.mesh.names,
                "sizes": resolved.mesh.sizes,
                "ranks": [
                    {
                        "rank": rank,
                        "host": hosts[rank // spec.resources.gpus_per_node],
                        "coordinate": resolved.mesh.coordinate(rank),
                    }
                    for rank in range(resolved.mesh.world_size)
                ],
            },
            "submission": {
                "parameters": submission.parameters,
                "text": submission.text,
                "env": submission.env,
            },
        }
    )


def _indent(text: str) -> str:
    return "\n".join("  " + line if line else line for line in text.splitlines())


def _debug(spec: JobSpec, console: Console) -> int:
    """One rank in this very process: a debugger, a breakpoint and a profiler see it as any other program."""
    from jobs.job import Job

    began = time.monotonic()
    os.environ.update(spec.rank_env)
    os.environ.update(executor.debug_env(spec))
    interrupts.as_python_does()
    result = RunDirectory(spec.run_dir).result
    try:
        record = Job(spec)()
    except (Exception, SystemExit) as error:  # sys.exit(0) in the middle of the work is no success
        console.complain(traceback.format_exc().rstrip())
        message = f"rank 0 on {socket.gethostname()}: {blame.failure_of(error, 0, '', 0, '').message}"
        write_json(result, {"status": "failed", "workload": spec.workload, "error": message})
        raise JobFailed(message) from None
    except KeyboardInterrupt:
        write_json(result, {"status": "interrupted", "workload": spec.workload, "error": "interrupted by SIGINT"})
        raise
    assert record is not None
    from jobs.cli.follow import report_end

    return report_end(record, console, time.monotonic() - began)
