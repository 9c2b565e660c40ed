"""The state of a job that runs independently: one protocol for every executor. Prints nothing."""

from __future__ import annotations

from typing import Any, Protocol

from jobs.run_dir import RunDirectory, Submitted
from jobs.runs.local_job import LocalJob
from jobs.runs.slurm_job import SlurmJob


class Tracker(Protocol):
    """One job, polled until it is over."""

    @property
    def waits(self) -> bool:
        """Whether the job is waiting for hosts, so that its run directory does not change."""

    def was_over(self) -> bool:
        """Whether the job is certainly over, without asking the scheduler."""

    def is_known(self) -> bool:
        """Whether the scheduler was asked and the job has not ended."""

    def is_over(self) -> bool:
        """Polls again; returns whether the job is over."""

    def has_ended(self) -> bool:
        """Whether the job has ended, as far as is known."""

    def news(self) -> list[str]:
        """The new lines for the user since the last call."""

    def pause(self) -> None:
        """Waits until it is time to poll again."""

    def record(self) -> dict[str, Any]:
        """The job's result as in result.json; writes it if no other process could."""


def track(run_dir: RunDirectory, submitted: Submitted) -> Tracker:
    """The tracker for a run's submission."""
    return (SlurmJob if submitted.executor == "slurm" else LocalJob)(run_dir, submitted)
