"""status.json: where the ranks of an attempt were a moment ago, as the leader writes it and others read it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.blame import LastSeen

LISTED = 64
"""How many ranks are listed at most: the ones that are furthest behind."""
STUCK_S = 5.0
"""Hosts report up to a second apart, so a rank that is behind for less than this is not singled out."""


def status(ranks: Sequence[LastSeen], now: float, last_step: int = -1) -> dict[str, Any]:
    """The content of status.json.

    Args:
        ranks: the progress of each rank that has not ended.
        now: seconds since the epoch.
        last_step: the last step that any rank, including one that has ended, has finished; -1 if none.
    """
    behind = sorted(ranks, key=lambda rank: (rank.number, -rank.ago_s, rank.rank))[:LISTED]
    return {
        "written": round(now, 1),
        "running": len(ranks),
        "phases": dict(Counter(rank.phase for rank in ranks)),
        "last_step": max([last_step, *(rank.number for rank in ranks)]),
        "behind": [
            {"rank": r.rank, "host": r.host, "step": r.number, "phase": r.phase, "since_s": round(r.ago_s, 1)}
            for r in behind
        ],
    }


def in_words(record: Mapping[str, Any] | None) -> str:
    """A sentence on where the ranks were; empty if no rank had finished a step or the record is damaged."""
    if record is None:
        return ""
    try:
        last = int(record["last_step"])
        if last < 0:
            return ""
        words = f"its ranks had finished step {last}"
        if not record["running"]:
            return words
        behind = record["behind"][0]
        step, phase, since_s = int(behind["step"]), behind["phase"], float(behind["since_s"])
        if step == last or since_s < STUCK_S:
            return words
        only = f"only step {step}" if step >= 0 else "none"
        return f"{words}, but rank {behind['rank']} on {behind['host']} {only} (in {phase} for {since_s:.0f} s)"
    except (LookupError, TypeError, ValueError):
        return ""
