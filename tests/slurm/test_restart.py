"""A Slurm job that goes on after a failure within its allocation, and after its time limit in another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.agent.test_restart import assert_as_undisturbed, attempt, total
from tests.jobs.submitting import Line
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(180)]

Submit = Callable[..., Line]


@pytest.fixture
def resumable(slurm: Cluster, typed: Submit, tmp_path: Path) -> Submit:
    """Types a line that runs the resumable workload on two hosts of two ranks, and follows it to its end."""
    shutil.copy(Path(__file__).parent.parent / "jobs/agent/resumable.py", tmp_path / "mine.py")
    shape = ("--wait", "--nodes", "2", "--gpus-per-node", "2")
    return lambda *words, **popen: typed("mine:ENTRY", *shape, *words, **{"env": slurm.env, **popen})


def test_a_rank_that_is_killed_costs_an_attempt_and_not_the_allocation(resumable: Submit, slurm: Cluster) -> None:
    line = resumable("--max-restarts", "3", "fails=[0/4/3/SIGKILL]")
    code, out, err = line.finish(120)
    assert (code, err) == (0, ""), out
    assert_as_undisturbed(line, attempts=2)
    first = attempt(line, 0)
    assert first["decision"] == "restarted as attempt 1 (restart 1 of 3)"
    assert first["error"].startswith("rank 3 on node1: killed by SIGKILL")
    assert f"attempt 0 failed ({first['error']}); restarted as attempt 1 (restart 1 of 3)" in out.splitlines()
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    assert slurm.job_state(job) == "COMPLETED"
    assert " Restarts=0 " in slurm.run("scontrol", "show", "job", job)
    for host in (0, 1):
        assert "ranks started: 2 (" in (line.run_dir / f"attempt-1/agent-{host}.log").read_text()


def test_of_a_job_that_fails_again_the_last_attempt_is_told(resumable: Submit, slurm: Cluster) -> None:
    line = resumable("--max-restarts", "1", "fails=[0/4/3/raise,1/5/2/SIGKILL]")
    code, out, err = line.finish(120)
    assert code == 1, out + err
    log = line.run_dir / "attempt-1/rank-2.log"
    says = f"rank 2 on node1: killed by SIGKILL (out of memory, or someone's kill -9) (log: {log}); not restarted: all"
    assert f"the job failed: {says}" in err.splitlines()[-1]
    assert f"meshrun: attempt 1 failed: {says}" in (line.run_dir / "slurm.log").read_text()
    line.assert_nothing_left()


def test_the_time_limit_costs_a_requeue_and_no_step(resumable: Submit, slurm: Cluster) -> None:
    """Slurm looks at limits twice a minute, so a warning 50 s before a limit of one minute comes within half of it."""
    words = ("--time", "1", "--sbatch", "signal=USR2@50", "steps=20", "pause_seconds=0.2")
    line = resumable(*words, "fails=[0/8/0/wait for the warning]")
    code, out, err = line.finish(170)
    assert (code, err) == (0, ""), out
    record = line.result()
    assert (record["status"], record["attempt"], record["result"]["step"]) == ("done", 1, 20)
    assert record["result"]["total"] == total(20)
    first = attempt(line, 0)
    assert (first["status"], first["stopped_by"]) == ("stopped", "time limit")
    assert first["decision"] == "requeued (requeue 1 of 3)"
    assert "at its time limit, the job is requeued up to 3 times (--max-requeues)" in out
    assert f"attempt 0 was stopped {first['error']}; attempt 1 goes on" in out
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    assert " Restarts=1 " in slurm.run("scontrol", "show", "job", job)


def test_a_job_that_is_cancelled_saves_its_step_and_does_not_come_back(resumable: Submit, slurm: Cluster) -> None:
    line = resumable("steps=100000", "pause_seconds=0.05")
    line.wait_for_step(3)
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    slurm.run("scancel", job)
    code, out, err = line.finish(60)
    assert code == 1, out + err
    record = line.result()
    assert (record["status"], record["stopped_by"]) == ("cancelled", "SIGTERM")
    saved = json.loads((line.run_dir / "checkpoints/progress.json").read_text())["step"]
    assert record["error"] == f"job {job} was cancelled, after step {saved} of 100000"
    assert slurm.job_state(job) == "CANCELLED"
    line.assert_nothing_left()
