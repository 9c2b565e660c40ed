"""What the leader leaves of an attempt's end: its result, and failure.json with the root cause and the decision."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.agent.job_state import JobState
from jobs.blame import Failure
from jobs.run_dir import BY_ITSELF, TIME_LIMIT, Attempt, RunDirectory, end_of, read_json, write_json
from jobs.spec import JobSpec

log = logging.getLogger(__name__)

LAST_LINES = 20


@dataclass
class EndRecord:
    """The record of one attempt.

    Args:
        spec: the job.
        run: where the result goes.
        attempt: the one that the record is of.
        started: when it was started, in seconds since the epoch.
    """

    spec: JobSpec
    run: RunDirectory
    attempt: Attempt
    started: float
    error: str = ""
    """What has failed, once that is published."""

    @property
    def is_work_done(self) -> bool:
        return (read_json(self.attempt.result) or {}).get("status") in BY_ITSELF

    def write_failure(self, cause: Failure, state: JobState, decision: str, why: str) -> None:
        """Writes failure.json; without room for it the run goes on."""
        try:
            write_json(self.attempt.failure_record, failure_record(self.attempt.number, cause, state, decision, why))
        except OSError as error:
            log.error("%s cannot be written: %s", self.attempt.failure_record, error)

    def publish(
        self,
        status: str,
        error: str,
        failure: Failure | None = None,
        *,
        decision: str = "",
        next_attempt: int | None = None,
    ) -> int:
        """Leaves the result, unless the work is done: then what came after it is a warning. Returns the exit code."""
        self.error = error
        record = {
            "status": status,
            "workload": self.spec.workload,
            "attempt": self.attempt.number,
            "seconds": round(time.time() - self.started, 3),
            "error": error,
            "traceback": failure.traceback if failure else "",
            "failure": failure.to_json() if failure else None,
            **({"decision": decision} if decision else {}),
            **({"next_attempt": next_attempt} if next_attempt is not None else {}),
        }
        try:
            published = self.run.publish(record)
            if published["status"] in BY_ITSELF and status == "failed":
                self.error = ""
                published["warnings"] = [*published.get("warnings", ()), error]
                write_json(self.attempt.result, published)
                return 0
        except OSError as unwritten:
            log.error("the result cannot be written: %s", unwritten)
        return 1

    def leave_memory(self, peak_bytes: Sequence[int | None]) -> None:
        """Leaves the most memory that each rank has held; None of a rank that has not said it."""
        try:
            write_json(self.attempt.memory, {"peak_bytes": [*peak_bytes]})
        except OSError as error:
            log.warning("%s cannot be written: %s", self.attempt.memory, error)

    def publish_script(self, stopped_at: int | None) -> None:
        """Leaves the result of a script, all of whose ranks have ended well.

        Args:
            stopped_at: the step at which it stopped because it was asked to; None: it did not.
        """
        try:
            result = json.loads(end_of(self.attempt.metrics, 100_000).splitlines()[-1])
        except (ValueError, IndexError):  # it has logged no step
            result = {}
        stopped = {"status": "stopped", "error": f"by request, after step {stopped_at}"}
        record = {
            **({"status": "done"} if stopped_at is None else stopped),
            "workload": self.spec.workload,
            "nodes": self.spec.resources.nodes,
            "gpus_per_node": self.spec.resources.gpus_per_node,
            "attempt": self.attempt.number,
            "seconds": round(time.time() - self.started, 3),
            "result": result,
        }
        try:
            self.run.publish(record)
        except OSError as error:
            log.error("the result cannot be written: %s", error)

    def complete(self, deaths: Sequence[str], stopped_by: str) -> None:
        """Adds to the result that rank 0 has left what only the leader knows.

        Args:
            deaths: how ranks died after their work was done.
            stopped_by: what asked the ranks to stop; empty: nothing did, so the workload stopped by itself.
        """
        record = read_json(self.attempt.result)
        if record is None:
            return
        if deaths:  # what is done is done: what came after it is told beside it
            record["warnings"] = deaths
        if record["status"] == "stopped":
            record["stopped_by"] = stopped_by or "the workload"
            if stopped_by == TIME_LIMIT:
                limit = f"before its time limit of {self.spec.resources.time_min} min"
                record["error"] = record["error"].replace("by request", limit, 1)
        if "stopped_by" in record or deaths:
            write_json(self.attempt.result, record)


def failure_record(attempt: int, cause: Failure, state: JobState, decision: str, why: str) -> dict[str, Any]:
    """What failure.json holds.

    Args:
        attempt: its number.
        cause: the root cause, with the path of its rank's log.
        state: where the ranks were last seen, and how they ended.
        decision: what became of the job.
        why: the reason for that.
    """
    where, done = state.last_seen(cause.rank), state.done()
    last_lines = end_of(Path(cause.log), 10_000).splitlines()[-LAST_LINES:] if cause.log else []
    others = [failure for failure in state.failures() if failure.rank != cause.rank]
    lost = sorted(failure.rank for failure in others if not failure.own)
    failed = sorted(failure.rank for failure in others if failure.own)
    signal = re.match(r"killed by (SIG\w+)", cause.message) if cause.kind == "killed" else None
    return {
        "attempt": attempt,
        "root_cause": {
            "rank": None if cause.is_between_hosts else cause.rank,
            "host": cause.host,
            "when": cause.when,
            "kind": cause.kind,
            "message": cause.message,
            "exception": cause.message.partition(":")[0] if cause.kind == "error" else None,
            "signal": signal[1] if signal else None,
            # Between two hosts: of the first rank that is not heard.
            "step": where.number if where.number >= 0 else None,
            "phase": where.phase,
            "in_phase_s": round(where.ago_s, 1),
            "log": cause.log,
            "last_lines": last_lines,
            "traceback": cause.traceback,
        },
        "others": {
            "lost_their_peer": len(lost),
            "failed_themselves": len(failed),
            "were_done": len(done),
            "were_still_running": len({*range(len(state.ranks))} - {cause.rank, *lost, *failed, *done}),
            # Of a job of thousands, the first ones say as much.
            "ranks_that_lost_their_peer": lost[:64],
            "ranks_that_failed_themselves": failed[:64],
        },
        "decision": decision,
        "why": why,
    }
