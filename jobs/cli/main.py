"""argv -> the verb's file; every error -> one line and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from jobs.cli import interrupts, options
from jobs.cli.console import Console
from jobs.errors import EXIT_USER_ERROR, USER_ERRORS, CommandLineError, Interrupted, JobFailed, did_you_mean, one_line
from workloads import registry


def main(argv: Sequence[str]) -> int:
    """Runs one command line.

    Returns:
        The exit code: 0 done, 1 the job failed, 2 the user's mistake, 130 interrupted.
    """
    console = Console(as_json="--json" in argv)
    try:
        with interrupts.raised(), console.guard_stdout():
            return _run(argv, console)
    except (Interrupted, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            console.error("interrupted")
            console.finish({"status": "interrupted", "exit_code": Interrupted.exit_code})
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of our output is gone; nothing is left to say, and the exit must not try to flush.
        sys.stdout = None
        return Interrupted.exit_code


def _run(argv: Sequence[str], console: Console) -> int:
    try:
        try:
            given = options.parse(argv)
        except SystemExit as done:  # argparse, after --help
            return int(done.code or 0)
        return _dispatch(given, console)
    except BrokenPipeError:
        raise
    except (*USER_ERRORS, OSError) as mistake:
        if console.job_started:
            raise
        line = str(mistake)
        if isinstance(mistake, OSError):  # a path that cannot be looked at; whoever knew a better line has said it
            line = f"{mistake.filename or 'the current directory'}: {mistake.strerror or mistake}; give another path"
        line = one_line(line)
        console.error(line)
        console.finish({"status": "refused", "exit_code": EXIT_USER_ERROR, "error": line})
        return EXIT_USER_ERROR
    except JobFailed as failure:
        console.error(one_line(f"the job failed: {failure}"))
        return failure.exit_code


def _dispatch(given: options.Options, console: Console) -> int:
    known = f"known: {', '.join(registry.BUILT_IN)}; your own: package.module:ENTRY"
    if not given.words:
        raise CommandLineError(f"which workload? {known}; see submit.py --help")
    first = given.words[0]
    if first == "list":
        from jobs.cli.list import run

        return run(given, console)
    if first == "wait":
        from jobs.cli.wait import run as wait

        return wait(given, console)
    if first in options.VERBS:
        raise CommandLineError(f"'{first}' is a reserved word, and this version does nothing for it yet; see --help")
    if ":" not in first and first not in registry.BUILT_IN:
        if "=" in first:
            key = first.partition("=")[0]
            raise CommandLineError(f"'{key}=...' comes before any workload; write submit.py WORKLOAD {key}=...")
        close = did_you_mean(first, (*registry.BUILT_IN, *options.VERBS))
        raise CommandLineError(f"'{first}': no such workload{close}; {known}")
    from jobs.cli.launch import run as launch

    return launch(given, console)
