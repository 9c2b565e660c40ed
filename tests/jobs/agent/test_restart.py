"""Restarts in place: failed ranks are started again by the agents that have them, and the run comes to the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.agent.restarts import Restarts
from jobs.blame import Failure
from tests.jobs.agent.test_ends import agents
from tests.jobs.submitting import Line, wait_until

Submit = Callable[..., Line]
STEPS = 6


@pytest.fixture
def resumable(typed: Submit, tmp_path: Path) -> Submit:
    """Types a line that runs the resumable workload on two emulated hosts of two ranks."""
    shutil.copy(Path(__file__).with_name("resumable.py"), tmp_path / "mine.py")
    return lambda *words, **popen: typed(
        "mine:ENTRY", "--executor", "local", "--nodes", "2", "--gpus-per-node", "2", *words, **popen
    )


def total(steps: int) -> float:
    """What an undisturbed run of four ranks comes to, exactly: what they add up are small powers of two."""
    value = 0.0
    for step in range(1, steps + 1):
        value = value * 1.5 + (1 + 2 + 3 + 4) / 2**step
    return value


def attempt(line: Line, number: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((line.run_dir / f"attempt-{number}" / "result.json").read_text())
    return record


def assert_as_undisturbed(line: Line, attempts: int) -> None:
    """The job is done, in the last of so many attempts, with what an undisturbed run comes to."""
    record = line.result()
    assert (record["status"], record["attempt"]) == ("done", attempts - 1)
    assert record["result"] == {"step": STEPS, "total": total(STEPS), "restarts": str(attempts - 1)}
    assert sorted(path.name for path in line.run_dir.glob("attempt-*")) == [f"attempt-{n}" for n in range(attempts)]
    line.assert_nothing_left()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raise", "rank 3 on host1: ValueError: the third layer is missing from <object object at 0x"),
        ("SIGKILL", "rank 3 on host1: killed by SIGKILL (out of memory, or someone's kill -9) (log: "),
        ("exit", "rank 3 on host1: called sys.exit(3) before its work was done (mine.py:"),
    ],
)
def test_a_rank_that_fails_once_costs_an_attempt(what: str, says: str, resumable: Submit) -> None:
    line = resumable("--max-restarts", "3", f"fails=[0/4/3/{what}]")
    code, out, err = line.finish()
    assert (code, err) == (0, ""), out
    assert_as_undisturbed(line, attempts=2)
    first = attempt(line, 0)
    assert first["decision"] == "restarted as attempt 1 (restart 1 of 3)"
    assert first["error"].startswith(says)
    assert (first["status"], first["failure"]["rank"]) == ("failed", 3)
    (shown,) = [text for text in out.splitlines() if text.startswith("attempt ")]
    assert shown == f"attempt 0 failed ({first['error']}); restarted as attempt 1 (restart 1 of 3)"
    steps = [row["step"] for row in line.metrics()]
    assert steps in ([3, 4, 5, 6], [4, 5, 6])
    for rank in range(4):
        assert (line.run_dir / f"attempt-1/rank-{rank}.log").exists()
    assert "ranks started: 4 (0 to 3 on host0), " in (line.run_dir / "attempt-1/agent-0.log").read_text()


@pytest.mark.dist
def test_failures_one_after_the_other_cost_an_attempt_each(resumable: Submit) -> None:
    """The first two at once, then one before the first step, one at a step that failed before, in another way."""
    fails = "fails=[0/3/1/SIGKILL,0/3/2/raise,1/3/0/SIGKILL,2/5/3/raise,3/5/3/SIGSEGV]"
    line = resumable("--max-restarts", "4", fails)
    code, out, err = line.finish()
    assert (code, err) == (0, ""), out
    assert_as_undisturbed(line, attempts=5)
    assert attempt(line, 3)["decision"] == "restarted as attempt 4 (restart 4 of 4)"


@pytest.mark.dist
def test_the_same_exception_at_the_same_step_ends_the_job(resumable: Submit) -> None:
    line = resumable("--max-restarts", "3", "fails=[0/4/3/raise,1/4/1/raise]")
    code, out, err = line.finish()
    assert code == 1, out + err
    why = "not restarted: the attempt before ended in the same way at the same place (after step 3)"
    assert err.splitlines()[-1].endswith(f"(log: {line.run_dir}/attempt-1/rank-1.log); {why}")
    assert line.result()["decision"] == why
    line.assert_nothing_left()


@pytest.mark.dist
def test_when_all_restarts_are_used_up_the_job_has_failed(resumable: Submit) -> None:
    line = resumable("--max-restarts", "1", "fails=[any/2/0/SIGKILL]")
    code, out, err = line.finish()
    assert code == 1, out + err
    assert err.splitlines()[-1].endswith("; not restarted: all restarts are used up (--max-restarts 1)")
    assert line.result()["attempt"] == 1
    line.assert_nothing_left()


@pytest.mark.dist
def test_a_job_that_is_interrupted_while_it_restarts_leaves_nothing(resumable: Submit, tmp_path: Path) -> None:
    fails = "fails=[0/3/0/ignore SIGTERM,0/3/3/raise]"  # so that there is a moment between the attempts
    line = resumable("--max-restarts", "3", fails, "steps=100000", "pause_seconds=0.05")
    log = line.run_dir / "attempt-0/agent-0.log"
    wait_until(lambda: log.exists() and "all ranks are ended" in log.read_text(), "the restart")
    os.kill(line.process.pid, signal.SIGINT)
    code, out, err = line.finish()
    assert code == 130, out + err
    line.assert_nothing_left()


@pytest.mark.dist
def test_an_agent_that_dies_after_a_restart_is_the_end(resumable: Submit) -> None:
    line = resumable("--max-restarts", "3", "fails=[0/3/3/raise]", "steps=100000", "pause_seconds=0.05")
    wait_until(lambda: (line.run_dir / "attempt-1/metrics.jsonl").exists(), "attempt 1")
    os.kill(agents(line)[0], signal.SIGKILL)
    code, out, err = line.finish()
    assert code == 1, out + err
    assert line.result()["attempt"] == 1
    assert "the leader on host0: killed by SIGKILL" in err.splitlines()[-1]
    line.assert_nothing_left()


# --- when there is none -----------------------------------------------------------------------------------------------


def failure(message: str, kind: Any = "error", rank: int = 0) -> Failure:
    return Failure(rank, "n0", 0.0, kind, message)


def test_only_what_a_rank_does_itself_at_the_same_step_is_a_repetition() -> None:
    restarts = Restarts(at_most=9)
    assert restarts.why_not(failure("ValueError: at 0x7f01"), 3) == ""
    assert restarts.why_not(failure("ValueError: at 0x7f01"), 4) == ""
    again = failure("ValueError: at 0xab", rank=2)
    assert "in the same way at the same place (after step 4)" in restarts.why_not(again, 4)
    assert restarts.why_not(failure("KeyError: 4"), 4) == ""
    killed = failure("killed by SIGKILL (out of memory, or someone's kill -9)", "killed")
    assert [restarts.why_not(killed, 4), restarts.why_not(killed, 4)] == ["", ""]
    crashed = failure("killed by SIGSEGV", "killed")
    assert restarts.why_not(crashed, -1) == ""
    assert "(after step 4)" in restarts.why_not(crashed, -1)  # it has come no further
    crashed_at_once = Restarts(at_most=9)
    assert crashed_at_once.why_not(crashed, -1) == ""
    assert "(before its first step)" in crashed_at_once.why_not(crashed, -1)
    lost = failure("gave up waiting", "lost_peer")
    assert [restarts.why_not(lost, 4), restarts.why_not(lost, 4)] == ["", ""]


def test_without_leave_no_rank_is_restarted() -> None:
    assert Restarts(at_most=0).why_not(failure("ValueError"), 3) == "--max-restarts is 0"
    assert "used up" in Restarts(at_most=1, made=1).why_not(failure("ValueError"), 3)
