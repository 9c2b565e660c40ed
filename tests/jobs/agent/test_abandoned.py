"""Agents that have lost their leader in a job with spare hosts; tests/slurm/test_failures.py loses its host, too."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from jobs.agent import abandoned
from jobs.slurm.query import JobState

Asked = Callable[..., list[str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Called with the job's states as Slurm, which is not there, tells them: what Slurm is asked to do."""

    def answers(*states: JobState, may_requeue: bool = True) -> list[str]:
        commands: list[str] = []
        left = list(states)
        monkeypatch.setattr(abandoned.query, "ask_scontrol", lambda *_: left.pop(0) if len(left) > 1 else left[0])
        why_not = "" if may_requeue else "Requeue is disabled"
        monkeypatch.setattr(abandoned.query, "requeue", lambda job, _: commands.append(f"requeue {job}") or why_not)
        monkeypatch.setattr(abandoned.query, "cancel", lambda jobs, _: commands.append(f"cancel {' '.join(jobs)}"))
        return commands

    return answers


ENV = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}
NOBODY = ("192.0.2.1", 9)
LOST = JobState("RUNNING", nodes="node[1-2]", restarts=1)
DOWN = JobState("COMPLETING", reason="JobLaunchFailure", nodes="node[1-2]", restarts=1)


def look(told: bool = False, address: tuple[str, int] = NOBODY) -> list[float]:
    slept: list[float] = []
    abandoned.requeue_without("node0", address, ENV, lambda: told, sleep=slept.append)
    return slept


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("state", [LOST, DOWN], ids=["lost", "set DOWN"])
def test_a_job_without_its_first_host_goes_back_into_the_queue(state: JobState, told: bool, asked: Asked) -> None:
    commands = asked(state)
    look(told)
    assert commands == ["requeue 12"]


def test_a_job_that_may_not_be_requeued_is_cancelled(asked: Asked) -> None:
    commands = asked(LOST, may_requeue=False)
    look()
    assert commands == ["requeue 12", "cancel 12"]


@pytest.mark.parametrize(
    "state",
    [replace(LOST, state="PENDING", restarts=2), replace(LOST, restarts=2), JobState("COMPLETING", nodes="node[0-2]")],
    ids=["requeued", "started again", "cancelled"],
)
def test_a_job_that_another_agent_or_a_person_has_seen_to_is_let_be(state: JobState, asked: Asked) -> None:
    commands = asked(state)
    look()
    assert commands == []
    commands = asked(LOST, state, may_requeue=False)  # in the meantime
    look()
    assert commands == ["requeue 12"]


def test_a_leader_that_ended_on_a_host_that_is_well_is_seen_to_by_srun(asked: Asked) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    commands = asked(replace(LOST, nodes="node[0-2]"))
    assert len(look(address=address)) == abandoned.ANSWERS - 1
    assert commands == []
