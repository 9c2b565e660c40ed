"""A local job that runs independently of this command, on this machine or another one."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import replace
from typing import Any

from jobs import blame, processes
from jobs.errors import JobFailed
from jobs.run_dir import RunDirectory, Submitted, end_of, read_json
from jobs.runs.result import Result, why_it_lingers
from jobs.runs.tail import last_lines

POLL_S = 0.1
ELSEWHERE_POLL_S = 1.0
"""The same for a job on another machine, whose run directory is on a shared file system."""
RESULT_WITHIN_S = 1.0
"""Seconds that the result may appear after the agent's end."""


class LocalJob:
    """A tracker (jobs/runs/tracker.py) of a local job's agent.

    Args:
        run_dir: the job's.
        submitted: its submission.
        writes: whether the result is written if no other process could.
    """

    waits = False

    def __init__(self, run_dir: RunDirectory, submitted: Submitted, *, writes: bool = True) -> None:
        self.run_dir, self.submitted, self.writes = run_dir, submitted, writes
        self.result = Result(run_dir)
        self.gone_since: float | None = None
        self.here = submitted.host == socket.gethostname()
        self._news: list[str] = []
        if not self.here and not self.was_over():
            self._news.append(f"the job runs on {submitted.host}; this machine learns of its end only from its result")

    def _runs(self) -> bool:
        return processes.runs(int(self.submitted.job_id), self.submitted.process_argument)

    def was_over(self) -> bool:
        return self.result.read() is not None and not (self.here and self._runs())

    def is_known(self) -> bool:
        return True

    def has_ended(self) -> bool:
        return self.result.read() is not None if not self.here else not self._runs()

    def is_over(self) -> bool:
        if not self.here:
            return self.result.read() is not None
        if self._runs():
            if self.result.lingers():
                self._news.append(why_it_lingers(int(self.submitted.job_id), self.result.run_dir))
            return False
        self.gone_since = self.gone_since or time.monotonic()
        return self.result.read() is not None or time.monotonic() - self.gone_since > RESULT_WITHIN_S

    def news(self) -> list[str]:
        news, self._news = self._news, []
        return news

    def pause(self) -> None:
        time.sleep(POLL_S if self.here else ELSEWHERE_POLL_S)

    def record(self) -> dict[str, Any]:
        return self.result.read() or without_result(self.run_dir, writes=self.writes)


def without_result(run_dir: RunDirectory, code: int | None = None, *, writes: bool = True) -> dict[str, Any]:
    """The record of a local job whose agent could not write one.

    The agent's log may still end with the failure: a full disk can have room for a line but not for another file.

    Args:
        run_dir: the job's run directory.
        code: how the agent ended, as in subprocess; None if not known.
        writes: whether the record is written to the run directory.
    """
    attempt, fault = run_dir.last_attempt(), run_dir.fault() if writes else ""
    log = attempt.agent_log()
    headline = last_lines(log, 1).partition(f"{JobFailed.__module__}.{JobFailed.__name__}: ")[2]
    failure = blame.failure_of_agent(code, 0, "host0", time.time(), str(log), end_of(log, 10_000))
    if fault and not headline and (code is None or code >= 0):
        failure, fault = replace(failure, message=f"ended without a record, as {fault}"), ""
    error = headline or failure.headline()
    record = {
        "status": "failed",
        "workload": (read_json(run_dir.job) or {}).get("workload", ""),
        "attempt": attempt.number,
        "error": error if not fault or "(file system " in error else f"{error}; {fault}",
        "traceback": last_lines(log),
    }
    if writes:
        run_dir.forget_secrets()  # its agent could not
        with contextlib.suppress(OSError):
            return run_dir.publish(record)
    return record
