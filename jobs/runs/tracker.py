"""How a job that goes on by itself stands: one protocol for every executor. Prints nothing."""

from __future__ import annotations

from typing import Any, Protocol

from jobs.run_dir import RunDirectory, Submitted
from jobs.runs.local_job import LocalJob
from jobs.runs.slurm_job import SlurmJob


class Tracker(Protocol):
    """One job, looked at again and again until it is over."""

    @property
    def waits(self) -> bool:
        """Whether it has no hosts (yet), so that its run directory does not change."""

    def was_over(self) -> bool:
        """Whether it is over for certain, without asking anybody."""

    def is_known(self) -> bool:
        """Whether the scheduler has been asked, and the job goes on."""

    def is_over(self) -> bool:
        """Looks again; whether that is the end."""

    def has_ended(self) -> bool:
        """Whether it has ended, as far as is known by now."""

    def news(self) -> list[str]:
        """The lines for people that came up since the last call."""

    def pause(self) -> None:
        """Until it is time to look again."""

    def record(self) -> dict[str, Any]:
        """How it ended, as result.json holds it; written down where nobody else could."""


def track(run_dir: RunDirectory, submitted: Submitted) -> Tracker:
    """The tracker of what a run directory became."""
    return (SlurmJob if submitted.executor == "slurm" else LocalJob)(run_dir, submitted)
