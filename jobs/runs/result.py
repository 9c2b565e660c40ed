"""The newest attempt's result.json of a run that may still be running."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from jobs import processes
from jobs.run_dir import BY_ITSELF, RunDirectory, read_json

LINGERS_S = 6.0
"""After this time, a rank whose work is done has logged why it is still running (jobs/processes.py)."""


def why_it_lingers(agent: int, run_dir: RunDirectory) -> str:
    """One line for a local job whose work is done and whose agent, with that process id, still runs."""
    if processes.is_stopped(agent):
        return f"the work is done, but the job's agent, process {agent}, is stopped; let it go on: kill -CONT {agent}"
    sinks = ", ".join((read_json(run_dir.job) or {}).get("track", ()))
    also = f", or {sinks} is still taking metrics" if sinks else ""
    return f"the work is done, but threads or exit hooks of a rank are still running{also}; see the logs of the ranks"


class Result:
    """The newest attempt's result.json, read when it changes."""

    def __init__(self, run_dir: RunDirectory) -> None:
        self.run_dir = run_dir
        self._seen: tuple[Path, int, int] | None = None
        self._record: dict[str, Any] | None = None
        self.since = 0.0
        """When the file was written, in seconds since the epoch."""
        self.changes = 0
        self._is_told = False

    def lingers(self) -> bool:
        """True once, if the job still runs LINGERS_S after its work was done."""
        record = self.read()
        if self._is_told or record is None or record["status"] not in BY_ITSELF:
            return False
        self._is_told = time.time() - self.since > LINGERS_S
        return self._is_told

    def read(self) -> dict[str, Any] | None:
        """The newest attempt's result, or None while it has none; an earlier attempt's result does not count."""
        newest = self.run_dir.last_attempt()
        try:
            try:
                stat = newest.result.stat()
            except FileNotFoundError:
                stat = self.run_dir.result.stat()  # an earlier version of meshrun wrote it only there
            seen = (newest.path, stat.st_ino, stat.st_mtime_ns)
        except OSError:
            self._seen = self._record = None
            return None
        if seen != self._seen:
            self._record = None
            with contextlib.suppress(OSError):  # it has just been replaced
                self._record = self.run_dir.recorded(newest.number)
            self._seen = seen
            self.since, self.changes = stat.st_mtime, self.changes + 1
        if self._record is not None and "next_attempt" in self._record:
            return None  # restarted in place; the next attempt's folder comes, or does not show here yet
        return self._record
