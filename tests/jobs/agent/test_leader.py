"""What the leader decides from what agents say; pure but for the result that it leaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jobs.agent import leader as module
from jobs.agent.leader import Leader
from jobs.blame import Failure
from jobs.run_dir import RunDirectory, read_json, write_json
from jobs.spec import JobSpec, ResourceSpec


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass between two looks of the leader; the first is changed by a test."""
    seconds = [0.5]
    now = [1000.0]

    def monotonic() -> float:
        now[0] += seconds[0]
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", monotonic)
    return seconds


class Job:
    """Two hosts of two ranks, and what their agents are told."""

    def __init__(self, directory: Path, on_slurm: bool = True, **changes: Any) -> None:
        resources = ResourceSpec(nodes=2, gpus_per_node=2)
        executor = "slurm" if on_slurm else "local"
        spec = JobSpec(
            workload="mine:ENTRY", settings={}, resources=resources, executor=executor, cluster="none",
            run_dir=directory, **changes,
        )  # fmt: skip
        self.run = RunDirectory(directory)
        self.sent: list[tuple[int, dict[str, Any]]] = []
        attempt = self.run.attempt(0).make()
        hosts, agents = ("n0", "n1"), 2 if on_slurm else 1
        self.leader = Leader(spec, self.run, attempt, hosts, agents, lambda n, m: self.sent.append((n, m)), on_slurm)
        for number in range(agents):
            self.leader.hear(number, {})

    def ends(self, rank: int, failure: Failure | None = None, *, ended: bool = True, done: bool = False) -> None:
        one = {
            "rank": rank,
            "ended": ended,
            "done": done,
            "failure": failure and failure.to_json(),
            "ago_s": 0.0,
            "death": "",
        }
        self.leader.hear(rank // 2, {"ended": [one]})

    def decide(self, but_silent: int = -1) -> dict[str, Any]:
        """Lets time pass, in which agents answer, until it has decided; the result."""
        for _ in range(1000):
            for number in (0, 1):
                if number != but_silent:
                    self.leader.hear(number, {})
            self.leader.step()
            if self.leader.code is not None:
                return read_json(self.leader.attempt.result) or {}
        raise AssertionError("no decision")


def of(rank: int, kind: Any, message: str = "it broke") -> Failure:
    return Failure(rank, f"n{rank // 2}", time.time(), kind, message)


def test_ranks_that_are_done_end_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    write_json(job.leader.attempt.result, {"status": "done", "attempt": 0})
    for rank in range(4):
        job.ends(rank, done=True)
    assert job.decide()["status"] == "done"
    assert job.leader.code == 0
    assert job.sent[-2:] == [(0, {"end": True, "code": 0}), (1, {"end": True, "code": 0})]


def test_a_ranks_own_failure_wins_over_the_loss_of_it(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.ends(0, of(0, "lost_peer"), ended=False)
    job.ends(3, of(3, "error", "ValueError: mine"))
    record = job.decide()
    assert (record["failure"]["rank"], record["error"]) == (3, "rank 3 on n1: ValueError: mine")
    assert job.leader.code == 1


def test_a_host_that_does_not_answer_is_the_root_cause_of_lost_peers(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for rank in (0, 1):
        job.ends(rank, of(rank, "lost_peer"), ended=False)
    record = job.decide(but_silent=1)
    assert record["error"].startswith("the agent on n1: has not answered for 5 s; its host or the network failed")


def test_a_host_that_still_imports_is_waited_for(tmp_path: Path, clock: list[float]) -> None:
    job = Job(tmp_path, rendezvous_timeout_s=300)
    job.leader._hosts[1].has_come = False
    clock[0] = 1.0
    for _ in range(200):  # three looks at the clock each
        job.leader.hear(0, {})
        job.leader.step()
    assert job.leader.code is None
    record = job.decide(but_silent=1)
    assert record["error"].startswith("the agent on n1: has said nothing for 300 s")


def test_a_rank_that_dies_as_its_host_is_told_to_end_is_no_failure(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.ends(2, of(2, "killed", "killed by SIGTERM (someone's kill, or the scheduler's)"))
    job.leader.hear(1, {"told": 15})
    job.leader.hear(0, {"told": 15})
    assert job.decide() == {}  # Slurm says why
    assert job.leader.code == 1


def test_a_rank_that_failed_before_its_host_was_told_to_end_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.ends(2, Failure(2, "n1", 0.0, "error", "ValueError: mine"))
    job.leader._seen[2].failure = Failure(2, "n1", time.time() - 1, "error", "ValueError: mine")
    job.leader.hear(0, {"told": 15})
    assert job.decide()["error"] == "rank 2 on n1: ValueError: mine"


def test_what_starts_the_job_locally_interrupts_it(tmp_path: Path) -> None:
    job = Job(tmp_path, on_slurm=False)
    job.leader.hear(0, {"told": 2})
    job.leader.step()
    assert (job.leader.code, (read_json(job.leader.attempt.result) or {})["status"]) == (1, "interrupted")


def test_a_failure_after_the_work_is_done_is_a_warning(tmp_path: Path) -> None:
    job = Job(tmp_path)
    write_json(job.leader.attempt.result, {"status": "done", "attempt": 0})
    job.ends(3, of(3, "error", "ValueError: mine"))
    assert job.decide()["warnings"] == ["rank 3 on n1: ValueError: mine"]
    assert job.leader.code == 0


def test_an_attempt_that_has_a_successor_touches_nothing_of_its(tmp_path: Path) -> None:
    """As on a host whose cable was pulled, when Slurm has long started the job elsewhere."""
    job = Job(tmp_path)
    theirs = {"status": "done", "attempt": 1}
    job.run.publish(dict(theirs))
    job.ends(0, of(0, "error", "ValueError: mine"))
    assert job.decide()["status"] == "failed"  # in its own folder
    assert job.leader.code == 1
    assert read_json(job.run.result) == job.run.recorded() == theirs
