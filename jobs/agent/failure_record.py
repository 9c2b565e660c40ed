"""failure.json: what ended an attempt, what that did to the other ranks, and what was decided. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from jobs.blame import Failure, LastSeen

LAST_LINES = 20


def failure_record(
    attempt: int,
    cause: Failure,
    where: LastSeen,
    log: str,
    others: Sequence[Failure],
    done: Collection[int],
    decision: str,
    why: str,
) -> dict[str, Any]:
    """The record.

    Args:
        attempt: its number.
        cause: the root cause.
        where: where its rank was last seen.
        log: the end of its log.
        others: what ended the other ranks, of those that failed, too.
        done: the ranks whose work was done.
        decision: what became of the job.
        why: the reason for that.
    """
    lost = sorted(failure.rank for failure in others if not failure.own)
    failed = sorted(failure.rank for failure in others if failure.own)
    signal = re.match(r"killed by (SIG\w+)", cause.message) if cause.kind == "killed" else None
    return {
        "attempt": attempt,
        "root_cause": {
            "rank": cause.rank,
            "host": cause.host,
            "when": cause.when,
            "kind": cause.kind,
            "message": cause.message,
            "exception": cause.message.partition(":")[0] if cause.kind == "error" else None,
            "signal": signal[1] if signal else None,
            "step": where.number if where.number >= 0 else None,
            "phase": where.phase,
            "in_phase_s": round(where.ago_s, 1),
            "log": cause.log,
            "last_lines": log.splitlines()[-LAST_LINES:],
            "traceback": cause.traceback,
        },
        "others": {
            "lost_their_peer": len(lost),
            "failed_themselves": len(failed),
            "were_done": len(done),
            # Of a job of thousands, the first ones say as much.
            "ranks_that_lost_their_peer": lost[:64],
            "ranks_that_failed_themselves": failed[:64],
        },
        "decision": decision,
        "why": why,
    }
