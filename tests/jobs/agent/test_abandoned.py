"""Agents that have lost their leader in a job with spare hosts; tests/slurm/test_failures.py loses its host, too."""

from __future__ import annotations

import socket

import pytest

from jobs.agent import abandoned
from jobs.slurm.query import JobState


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of Slurm, which is not there: the job runs on, without its first host."""
    commands: list[str] = []
    monkeypatch.setattr(abandoned.query, "ask_scontrol", lambda *_: JobState("RUNNING", nodes="node[1-2]"))
    monkeypatch.setattr(abandoned.query, "requeue", lambda job, _: commands.append(f"requeue {job}") or "Disabled")
    monkeypatch.setattr(abandoned.query, "cancel", lambda job, _: commands.append(f"cancel {job}"))
    return commands


def test_a_job_that_may_not_be_requeued_is_cancelled(asked: list[str]) -> None:
    abandoned.requeue_without("node0", ("192.0.2.1", 9), "12", {}, lambda: False, sleep=lambda _: None)
    assert asked == ["requeue 12", "cancel 12"]


def test_a_leader_that_ended_on_a_host_that_is_well_is_seen_to_by_srun(asked: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    slept: list[float] = []
    abandoned.requeue_without("node1", address, "12", {}, lambda: False, sleep=slept.append)
    assert (asked, len(slept)) == ([], abandoned.ANSWERS - 1)
