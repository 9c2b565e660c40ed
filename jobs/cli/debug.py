"""One rank in this process, so that debuggers, breakpoints and profilers work as in any other program."""

from __future__ import annotations

import os
import socket
import time
import traceback

from jobs import blame, executor
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.report import report_end
from jobs.errors import JobFailed
from jobs.job import Job
from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec


def run(spec: JobSpec, console: Console) -> int:
    """Runs the one rank.

    Returns:
        The exit code.

    Raises:
        JobFailed: the rank failed; its traceback has been printed.
    """
    began = time.monotonic()
    os.environ.update(spec.rank_env)
    os.environ.update(executor.debug_env(spec))
    interrupts.as_python_does()
    run_dir = RunDirectory(spec.run_dir)
    ended = {"workload": spec.workload, "attempt": run_dir.begin_attempt().number}
    try:
        record = Job(spec)()
    except (Exception, SystemExit) as error:  # sys.exit(0) before the work is done is a failure
        console.complain(traceback.format_exc().rstrip())
        message = blame.failure_of(error, 0, socket.gethostname(), 0, "").headline()
        run_dir.publish({**ended, "status": "failed", "error": message})
        raise JobFailed(message) from None
    except KeyboardInterrupt:
        run_dir.publish({**ended, "status": "interrupted", "error": "interrupted by SIGINT"})
        raise
    finally:
        run_dir.forget_secrets()
    assert record is not None
    return report_end(record, console, time.monotonic() - began, run_dir)
