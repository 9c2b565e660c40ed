"""excluded.json: hosts of a run that were the root cause twice. For a day, a requeue and `resume` do without them.

A requeue sets Slurm's own list of the job, which lasts as long as the job.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jobs.blame import Failure
from jobs.run_dir import RunDirectory, read_json, write_json
from jobs.spec import JobSpec

EXCLUDED_FOR_S = 24 * 3600.0
FAILED_TWICE = "its host was the root cause twice"
NO_SPARE = "no spare host is left"
REQUEUED_WITH = "requeued with"
"""How the decision begins: without that host, with it where there are too few others, or with other spare hosts."""


@dataclass(frozen=True)
class ExcludedHost:
    """One line of the list."""

    host: str
    why: str
    """Its second failure."""
    until: float
    """Seconds since the epoch."""

    def __str__(self) -> str:
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.until))
        return f"{self.host} (until {until}: was the root cause twice, at last {self.why})"


def is_due(spec: JobSpec, run: RunDirectory, cause: Failure, attempt: int) -> bool:
    """Whether this failure of an attempt is its host's second one within a day, and a requeue can do without the host.

    The end of an agent does not count: if it is silent, it may be the leader's host that was cut off.
    """
    can_requeue = spec.executor == "slurm" and spec.sbatch.get("requeue") is not False
    can_requeue = can_requeue and shutil.which("scontrol") is not None  # some sites' hosts and images have none
    if not can_requeue or not _counts(cause) or requeues(run) >= spec.max_requeues:
        return False
    before = (Failure.from_json((run.recorded(number) or {}).get("failure")) for number in range(attempt))
    return any(
        one is not None and _counts(one) and one.host == cause.host and cause.when - one.when < EXCLUDED_FOR_S
        for one in before
    )


def _counts(failure: Failure) -> bool:
    return failure.own and failure.kind != "agent"


def requeues(run: RunDirectory) -> int:
    """How often the run was requeued because a host was the root cause twice, or no spare host was left."""
    decisions = ((run.recorded(n) or {}).get("decision", "") for n in range(run.last_attempt().number + 1))
    return sum(decision.startswith(REQUEUED_WITH) for decision in decisions)


def exclude(run: RunDirectory, cause: Failure) -> ExcludedHost:
    """Adds a failure's host to the list, or prolongs its time there."""
    new = ExcludedHost(cause.host, cause.message, time.time() + EXCLUDED_FOR_S)
    kept = [one for one in _listed(run) if one.host != new.host]
    write_json(run.excluded, {"hosts": [asdict(one) for one in [*kept, new]]})
    return new


def excluded(run: RunDirectory) -> list[ExcludedHost]:
    """The hosts that are excluded now."""
    return [one for one in _listed(run) if one.until > time.time()]


def option(given: str, run: RunDirectory) -> str:
    """Slurm's list of hosts to exclude: the user's, without what this had added before, and what it adds now."""
    added_before = {one.host for one in _listed(run)}
    by_user = [part for part in re.split(r",(?![^\[]*\])", given) if part and part not in added_before]
    return ",".join([*by_user, *(one.host for one in excluded(run))])


def _listed(run: RunDirectory) -> Sequence[ExcludedHost]:
    found = []
    for one in (read_json(run.excluded) or {}).get("hosts", ()):
        try:
            host = ExcludedHost(str(one["host"]), str(one["why"]), float(one["until"]))
        except (TypeError, KeyError, ValueError):  # not as we write it
            continue
        found.append(host)
    return found
