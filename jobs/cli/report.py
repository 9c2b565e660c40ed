"""Prints how a job ended."""

from __future__ import annotations

from typing import Any

from jobs import code_copy
from jobs.cli.console import Console
from jobs.errors import EXIT_DONE, EXIT_FAILED
from jobs.run_dir import RunDirectory
from jobs.runs import report
from jobs.runs.find import come_back


def report_end(record: dict[str, Any], console: Console, seconds: float | None, run_dir: RunDirectory) -> int:
    """Prints the job's result.

    Args:
        record: the content of result.json.
        console: where it is printed.
        seconds: how long the job took; None if not known.
        run_dir: the job's.

    Returns:
        The exit code.
    """
    if record["status"] == "done":
        for line in report.done(record, seconds):
            console.say(line)
        code = EXIT_DONE
    else:
        if details := report.details(record):
            console.complain(code_copy.original_of(run_dir, details))
        for warning in record.get("warnings", ()):
            console.complain(f"warning: {warning}")
        if run_dir.has_checkpoints():
            console.complain(f"go on from the newest checkpoint: {come_back(run_dir, 'resume')}")
        console.error(report.headline(record))
        code = EXIT_FAILED
    console.finish({**record, "exit_code": code})
    return code
