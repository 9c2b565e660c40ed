"""Runs the verb of a command line; turns every error into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from jobs import secret_values
from jobs.cli import commands, completion, interrupts, options
from jobs.cli.console import Console
from jobs.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    USER_ERRORS,
    Interrupted,
    JobFailed,
    OutputLost,
    SubmissionUnknown,
    one_line,
)
from workloads.errors import refusal_of


def main(argv: Sequence[str]) -> int:
    """Runs one command line; with --json it prints exactly one object, whatever happens.

    Returns:
        The exit code: 0 success, 1 the job failed, 2 the user's mistake, 130 interrupted.
    """
    if completion.is_asked(os.environ):
        completion.offer()
    secret_values.know_words(argv)
    console = Console(as_json="--json" in options.split_at_script(argv).own)
    try:
        with interrupts.raised(), console.guard_stdout():
            code = _run(argv, console)
            console.flush()
            return code
    except (Interrupted, KeyboardInterrupt) as interruption:
        if not isinstance(interruption, OutputLost):
            console.error("interrupted")
        elif not interruption.reader_is_gone:  # a reader such as `head` is gone, which is no error
            console.error(str(interruption))
        with contextlib.suppress(OutputLost):
            console.finish({"status": "interrupted", "exit_code": Interrupted.exit_code})
        return Interrupted.exit_code
    except Exception as error:
        console.complain(traceback.format_exc().rstrip())
        with contextlib.suppress(OutputLost):
            line = one_line(f"{type(error).__name__}: {error}")
            console.finish({"status": "crashed", "exit_code": EXIT_FAILED, "error": line})
        return EXIT_FAILED


def _run(argv: Sequence[str], console: Console) -> int:
    try:
        try:
            verb, given = options.parse(argv)
        except SystemExit:  # argparse, after --help
            console.finish({"status": "help", "exit_code": EXIT_DONE})
            return EXIT_DONE
        with interrupts.unmasked():
            return _dispatch(verb, given, console)
    except (*USER_ERRORS, OSError, ModuleNotFoundError) as mistake:
        line = one_line(_line(mistake))
        if console.job_started or not line:
            raise
        console.error(line)
        console.finish({"status": "refused", "exit_code": EXIT_USER_ERROR, "error": line})
        return EXIT_USER_ERROR
    except JobFailed as failure:
        unknown = isinstance(failure, SubmissionUnknown)
        console.error(f"{'' if unknown else 'the job failed: '}{failure}")
        status = "unknown" if unknown else "failed"
        console.finish({"status": status, "exit_code": failure.exit_code, "error": str(failure)})
        return failure.exit_code


def _line(mistake: Exception) -> str:
    """The line about a user's mistake; empty if the error is not one."""
    if isinstance(mistake, ModuleNotFoundError):
        if (mistake.name or "").partition(".")[0] in ("jobs", "workloads"):
            return ""
        return (
            f"the Python package '{mistake.name}' is not installed for {sys.executable}; run `make setup` and use "
            ".venv/bin/python, or `pip install -e .`"
        )
    if isinstance(mistake, OSError):
        # The error has no path if the current directory was removed.
        if mistake.filename is None and isinstance(mistake, FileNotFoundError):
            mistake.filename = "the current directory"
        return refusal_of(mistake) if mistake.filename else str(mistake)
    return str(mistake)


def _dispatch(verb: commands.Verb, given: options.Options, console: Console) -> int:
    # Must not be interrupted, otherwise the import of pydantic panics.
    with interrupts.held():
        module = importlib.import_module(verb.module)
    code: int = module.run(given, console)
    return code
