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


_END = {"ended": True, "done": False, "by": None}


class Job:
    """Two hosts of two ranks, and what their agents are told."""

    def __init__(
        self, directory: Path, on_slurm: bool = True, minutes: int | None = None, spares: int = 0, **changes: Any
    ) -> None:
        resources = ResourceSpec(nodes=2, gpus_per_node=2, time_min=minutes, spares=spares)
        executor = "slurm" if on_slurm else "local"
        spec = JobSpec(
            workload="mine:ENTRY", settings={}, resources=resources, executor=executor, cluster="none",
            run_dir=directory, **changes,
        )  # fmt: skip
        self.run = RunDirectory(directory)
        self.sent: list[tuple[int, dict[str, Any]]] = []
        attempt = self.run.attempt(0).make()
        hosts, agents = tuple(f"n{n}" for n in range(2 + spares)), 2 + spares if on_slurm else 1
        self.leader = Leader(spec, self.run, attempt, hosts, agents, lambda n, m: self.sent.append((n, m)), on_slurm)
        for number in range(agents):
            self.leader.hear(number, {})

    def ends(self, rank: int, failure: Failure | None = None, **changes: Any) -> None:
        ended, done, by = (changes.get(name, default) for name, default in _END.items())
        one = {
            "rank": rank,
            "ended": ended,
            "done": done,
            "failure": failure and failure.to_json(),
            "ago_s": 0.0,
            "death": "",
        }
        self.leader.hear(rank // 2 if by is None else by, {"ended": [one]})

    def decide(self, but_silent: int = -1) -> dict[str, Any]:
        """Lets time pass, in which agents answer, until it has decided; the result."""
        for _ in range(1000):
            for number in range(self.leader.agents):
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


def test_a_host_that_does_not_answer_is_not_accused_alone(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for rank in (0, 1):
        job.ends(rank, of(rank, "lost_peer"), ended=False)
    record = job.decide(but_silent=1)
    says = "out of touch for 5 s; one of the two, its host, or the network between the hosts failed"
    assert record["error"].startswith(f"the agents on n0 and n1: {says}")
    cause = (read_json(job.leader.attempt.failure_record) or {})["root_cause"]
    assert (cause["host"], cause["rank"]) == ("n0 and n1", None)


def test_a_host_that_does_not_answer_where_others_do_is_the_root_cause(tmp_path: Path) -> None:
    job = Job(tmp_path, spares=1)
    job.ends(0, of(0, "lost_peer"), ended=False)
    record = job.decide(but_silent=1)
    says = "has not been heard for 5 s, and other hosts have: its host, or the network to it, failed"
    assert record["error"].startswith(f"the agent on n1: {says}")
    assert record["failure"]["host"] == "n1"


def test_a_host_that_still_imports_is_waited_for(tmp_path: Path, clock: list[float]) -> None:
    job = Job(tmp_path, rendezvous_timeout_s=300)
    job.leader._state.hosts[1].has_come = False
    clock[0] = 1.0
    for _ in range(200):  # three looks at the clock each
        job.leader.hear(0, {})
        job.leader.step()
    assert job.leader.code is None
    record = job.decide(but_silent=1)
    assert record["error"].startswith("the agents on n0 and n1: out of touch for 300 s; ")


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
    job.leader._state.ranks[2].failure = Failure(2, "n1", time.time() - 1, "error", "ValueError: mine")
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
    assert job.decide()["error"] == "the scheduler has started this job again (attempt 1)"  # in its own folder
    assert job.leader.code == 0  # with another one srun would end its step
    assert read_json(job.run.result) == job.run.recorded() == theirs


def test_the_end_leaves_one_record_of_what_it_was(tmp_path: Path) -> None:
    job = Job(tmp_path)
    log = tmp_path / "rank-3.log"
    log.write_text("\n".join(map(str, range(100))))
    job.leader.hear(1, {"ranks": [(3, 7, "forward", 0.25)]})
    job.ends(0, of(0, "lost_peer"), ended=False)
    job.ends(1, of(1, "lost_peer"), ended=False)
    job.ends(3, Failure(3, "n1", time.time(), "killed", "killed by SIGKILL (out of memory)", log=str(log)))
    job.decide()
    record = read_json(job.leader.attempt.failure_record) or {}
    cause = record["root_cause"]
    assert (cause["rank"], cause["host"], cause["signal"], cause["exception"]) == (3, "n1", "SIGKILL", None)
    assert (cause["step"], cause["phase"]) == (7, "forward")
    assert cause["last_lines"] == [str(n) for n in range(80, 100)]
    assert record["others"]["lost_their_peer"] == 2
    assert record["others"]["ranks_that_lost_their_peer"] == [0, 1]
    assert (record["decision"], record["why"]) == ("the job has failed", "--max-restarts is 0")


# --- a restart in place -----------------------------------------------------------------------------------------------


def restarting(directory: Path) -> Job:
    """A job that is about to be restarted: rank 3 has failed."""
    job = Job(directory, max_restarts=2)
    job.ends(3, of(3, "error", "ValueError: mine"))
    while (0, {"restart": True}) not in job.sent:
        job.leader.hear(0, {})
        job.leader.hear(1, {})
        job.leader.step()
    assert job.sent[-2:] == [(0, {"restart": True}), (1, {"restart": True})]
    assert job.leader.attempt.number == 0
    return job


def test_ranks_start_again_when_every_host_has_ended_its_own(tmp_path: Path) -> None:
    job = restarting(tmp_path)
    job.leader.hear(0, {"ready": True})
    job.leader.step()
    assert not (tmp_path / "attempt-1").exists()
    job.leader.hear(1, {"ready": True})
    job.leader.step()
    assert job.sent[-2:] == [(n, {"start": 1, "places": [0, 1]}) for n in (0, 1)]
    failed = read_json(job.run.attempt(0).result) or {}
    assert (failed["error"], failed["next_attempt"]) == ("rank 3 on n1: ValueError: mine", 1)
    assert failed["decision"] == "restarted as attempt 1 (restart 1 of 2)"
    record = read_json(job.run.attempt(0).failure_record) or {}
    assert (record["decision"], record["why"][:13]) == (failed["decision"], "a rank failed")
    assert record["root_cause"]["exception"] == "ValueError"
    assert job.leader.attempt == job.run.last_attempt() == job.run.attempt(1)
    # And what it then hears is of the new ranks.
    write_json(job.leader.attempt.result, {"status": "done", "attempt": 1})
    for rank in range(4):
        job.ends(rank, done=True)
    assert job.decide()["attempt"] == 1
    assert job.leader.code == 0


def test_a_host_that_is_lost_while_ranks_are_ended_prevents_the_restart(tmp_path: Path) -> None:
    job = restarting(tmp_path)
    job.leader.lose(1)
    record = job.decide(but_silent=1)
    assert record["error"].startswith("rank 3 on n1: ValueError: mine; not restarted: the agent on n1 is gone")
    assert "next_attempt" not in record
    assert not (tmp_path / "attempt-1").exists()


def test_a_host_that_does_not_end_its_ranks_prevents_the_restart(tmp_path: Path) -> None:
    job = restarting(tmp_path)
    job.leader.hear(0, {"ready": True})
    assert "not restarted: the agent on n1 is gone" in job.decide()["error"]


def test_restarts_are_counted_in_all_starts_of_the_job(tmp_path: Path) -> None:
    Job(tmp_path).run.publish({"status": "failed", "attempt": 0, "decision": "restarted as attempt 1 (restart 1 of 1)"})
    job = Job(tmp_path, max_restarts=1)
    job.ends(3, of(3, "error"))
    assert job.decide()["decision"] == "not restarted: all restarts are used up (--max-restarts 1)"


def test_an_attempt_that_has_a_successor_is_not_restarted(tmp_path: Path) -> None:
    job = restarting(tmp_path)
    job.run.begin_attempt()
    for number in (0, 1):
        job.leader.hear(number, {"ready": True})
    record = job.decide()
    assert "not restarted: attempt 1 cannot be begun: the scheduler has started this job again" in record["error"]
    assert "next_attempt" not in record


def test_a_failure_after_the_work_is_done_restarts_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, max_restarts=2)
    write_json(job.leader.attempt.result, {"status": "done", "attempt": 0})
    job.ends(3, of(3, "error", "ValueError: mine"))
    assert job.decide()["warnings"] == ["rank 3 on n1: ValueError: mine"]
    assert job.leader.code == 0


def test_a_job_that_is_told_to_end_while_it_restarts_ends(tmp_path: Path) -> None:
    job = restarting(tmp_path)
    job.leader.hear(0, {"told": 15})
    assert job.decide()["error"].startswith("rank 3 on n1: ValueError: mine; not restarted: the job was told to end")
    assert job.sent[-1] == (1, {"end": True, "code": 1})


def test_a_start_that_has_a_successor_ends(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.run.begin_attempt()
    job.leader.supersede(1)
    record = read_json(job.run.attempt(0).result) or {}
    assert (record["status"], job.leader.code) == ("failed", 0)
    assert record["error"] == "the scheduler has started this job again (attempt 1)"
    assert job.run.recorded() is None


# --- spare hosts ------------------------------------------------------------------------------------------------------


def restart(job: Job, *, of: tuple[int, ...]) -> dict[str, Any]:
    """Lets time pass until agents are asked to restart and these have ended their ranks; what they are told then."""
    for _ in range(100):
        if job.sent and job.sent[-1][1] == {"restart": True}:
            break
        job.leader.step()
    for number in of:
        job.leader.hear(number, {"ready": True})
    job.leader.step()
    return job.sent[-1][1]


def test_a_spare_host_takes_a_lost_hosts_place_until_none_is_left(tmp_path: Path) -> None:
    job = Job(tmp_path, spares=1, max_restarts=5)
    job.leader.lose(1)
    assert restart(job, of=(0, 2)) == {"start": 1, "places": [0, 2]}
    record = read_json(job.run.attempt(0).failure_record) or {}
    assert record["decision"] == "restarted as attempt 1 (restart 1 of 5), spare host n2 in place of n1"
    assert record["root_cause"]["host"] == "n1"
    # The lost host is heard of again: it is told to end, and its ranks count no more.
    assert (1, {"end": True, "code": 1}) in job.sent
    job.leader.hear(1, {"ranks": [(2, 99, "forward", 0.0)]})
    job.leader.hear(2, {"ranks": [(2, 7, "forward", 0.0), (3, 7, "forward", 0.0)]})
    assert max(rank.step for rank in job.leader._state.ranks) == 7
    job.leader.lose(2)
    record = job.decide(but_silent=1)
    assert record["error"].startswith("the agent on n2: ended without a record")
    assert record["decision"] == "not restarted: the agent on n2 is gone, and no spare host is left"


def test_an_agent_that_has_not_heard_the_leader_is_not_called_killed(tmp_path: Path) -> None:
    """Where the leader's own process was suspended, say."""
    job = Job(tmp_path)
    job.leader.hear(1, {"left": 30.0})
    record = job.decide(but_silent=1)
    assert record["error"].startswith("the agents on n0 and n1: out of touch for 30 s; one of the two, its host, or")


def test_the_loss_of_a_spare_host_fails_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, spares=1, max_restarts=5)
    job.leader.lose(2)
    write_json(job.leader.attempt.result, {"status": "done", "attempt": 0})
    for rank in range(4):
        job.ends(rank, done=True)
    assert job.decide()["status"] == "done"


def test_a_spare_host_takes_the_place_of_one_that_failed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent of the bad host may lead: it then leads without ranks, and is no spare host."""
    job = Job(tmp_path, spares=1, max_restarts=5)
    monkeypatch.setattr(module, "is_due", lambda *_: True)
    job.ends(0, of(0, "error", "ValueError: mine"))
    assert restart(job, of=(0, 1, 2)) == {"start": 1, "places": [2, 1]}
    assert [one["host"] for one in (read_json(job.run.excluded) or {})["hosts"]] == ["n0"]
    job.ends(0, Failure(0, "n2", time.time(), "error", "ValueError: another"), by=2)
    assert job.decide()["decision"] == "not restarted: its host was the root cause twice"


# --- asked to stop ----------------------------------------------------------------------------------------------------


def stopped(job: Job) -> dict[str, Any]:
    """Every rank of a job that was asked to stop does so."""
    write_json(job.leader.attempt.result, {"status": "stopped", "attempt": 0, "error": "by request, after step 3"})
    for rank in range(4):
        job.ends(rank, done=True)
    return job.decide()


def test_who_asked_a_run_to_stop_is_recorded(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.leader.hear(1, {"asked": "SIGUSR2"})
    assert stopped(job)["stopped_by"] == "SIGUSR2"


def test_a_lead_time_that_is_too_short_is_no_hindrance(tmp_path: Path, clock: list[float]) -> None:
    """The leader asks by itself, and for the batch script it is the time limit's warning."""
    job = Job(tmp_path, minutes=60)
    for step in range(3):
        for _ in range(100):
            job.leader.hear(0, {"ranks": [(0, step, "training", 0.0)]})
            job.leader.hear(1, {})
            job.leader.step()
    assert all("stacks" in message for _, message in job.sent)
    job.leader._lead_time.ends_at = time.monotonic() + 100
    job.leader.step()
    assert job.sent[-2:] == [(0, {"stop": True}), (1, {"stop": True})]
    assert stopped(job)["stopped_by"] == "SIGUSR2"


def test_ranks_save_while_slurm_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for number in (0, 1):
        job.leader.hear(number, {"asked": "SIGTERM"})
        job.leader.hear(number, {"told": 15})
    for _ in range(3):
        job.leader.step()
    assert job.leader.code is None
    record = stopped(job)
    assert (record["stopped_by"], job.leader.code) == ("SIGTERM", 0)


def test_ranks_that_do_not_stop_are_ended_after_the_grace_time(tmp_path: Path) -> None:
    job = Job(tmp_path, grace_s=10)
    job.leader.hear(0, {"told": 15})
    before = module.time.monotonic()
    assert job.decide() == {}  # Slurm says why
    assert 10 < module.time.monotonic() - before < 15
    assert job.leader.code == 1
