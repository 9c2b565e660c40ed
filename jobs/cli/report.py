"""Prints how a job ended."""

from __future__ import annotations

from typing import Any

from jobs.cli.console import Console
from jobs.errors import EXIT_DONE, EXIT_FAILED
from jobs.runs import report


def report_end(record: dict[str, Any], console: Console, seconds: float | None) -> int:
    """Prints the job's result.

    Args:
        record: the content of result.json.
        console: where it is printed.
        seconds: how long the job took; None if not known.

    Returns:
        The exit code.
    """
    if record["status"] == "done":
        for line in report.done(record, seconds):
            console.say(line)
        code = EXIT_DONE
    else:
        if details := report.details(record):
            console.complain(details)
        console.error(report.headline(record))
        code = EXIT_FAILED
    console.finish({**record, "exit_code": code})
    return code
