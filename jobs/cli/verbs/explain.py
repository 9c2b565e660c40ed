"""`submit.py explain [RUN]`: says why a run failed, hangs or waits."""

from __future__ import annotations

import os
import shutil
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

from jobs import code_copy
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.errors import CommandLineError
from jobs.runs.cause import Cause
from jobs.runs.explain import explain
from jobs.runs.find import find

WIDEST = 100
"""Columns of the paragraph, however wide the terminal is."""


def run(given: Options, console: Console) -> int:
    """Prints the paragraph, and the files that show it.

    Returns:
        The exit code, 0, whatever became of the run.

    Raises:
        CommandLineError: there is no such run or attempt.
    """
    run_dir = find(given.run)
    attempt = None
    if given.attempt is not None:
        newest = run_dir.last_attempt().number
        if not given.attempt.isdecimal() or int(given.attempt) > newest or not run_dir.has_begun(int(given.attempt)):
            raise CommandLineError(
                f"--attempt {given.attempt}: {run_dir.path} has no such attempt; its newest is {newest}"
            )
        attempt = int(given.attempt)
    cause = explain(run_dir, attempt)
    if cause.file:  # in the user's tree, where it can be mended
        cause = replace(cause, file=code_copy.original_of(run_dir, f'"{cause.file}"').strip('"'))
    name = run_dir.name if attempt is None else f"{run_dir.name}, attempt {attempt}"
    for line in lines_of(cause, name, shutil.get_terminal_size().columns):
        console.say(line)
    console.finish({**asdict(cause), "run_dir": str(run_dir.path), "attempt": attempt, "exit_code": 0})
    return 0


def lines_of(cause: Cause, name: str, width: int) -> list[str]:
    """What is printed: the run and the kind of the cause, the paragraph, the files.

    A path is never broken, so that it can be pasted; a line with a long one may be wider.
    """
    paragraph = textwrap.wrap(
        " ".join(cause.sentences), max(20, min(width, WIDEST)), break_long_words=False, break_on_hyphens=False
    )
    places = {"code": (cause.file, cause.line), "log": (cause.log, cause.log_line)}
    if cause.file == cause.log:
        del places["code"]
    files = [
        f"  {what + ':':<5} {_relative(file)}{f':{line}' if line else ''}"
        for what, (file, line) in places.items()
        if file
    ]
    return [f"{name}: {_TITLES[cause.kind]}", *paragraph, *files]


_TITLES = {
    "done": "done",
    "stopped": "stopped",
    "running": "running",
    "starting": "starting",
    "standstill": "running, and stands still",
    "queue": "waits in the queue",
    "exception": "failed by an exception",
    "non_finite": "failed by a number that is not finite",
    "gpu_memory": "out of GPU memory",
    "host_memory": "out of host memory",
    "disk_full": "failed because a disk is full",
    "import": "failed in an import",
    "missing_file": "failed because a file is missing",
    "gpu": "failed by an error of a GPU",
    "no_gpu": "failed because there is no GPU",
    "nccl": "failed in NCCL",
    "rendezvous": "failed because ranks did not find each other",
    "topology": "failed because hosts do not fit together",
    "hang": "failed because it hung",
    "left_early": "failed because a rank left early",
    "exit": "failed because a rank exited",
    "signal": "failed by a signal",
    "agent": "failed by the end of an agent",
    "bad_host": "failed by a host",
    "launch": "failed before it began",
    "time_limit": "ended by its time limit",
    "preemption": "preempted",
    "cancelled": "cancelled",
    "interrupted": "interrupted",
    "superseded": "superseded",
    "unknown": "unknown",
}


def _relative(file: str) -> str:
    path, here = Path(file), Path(os.getcwd())  # noqa: PTH109
    return str(path.relative_to(here)) if path.is_relative_to(here) else file
