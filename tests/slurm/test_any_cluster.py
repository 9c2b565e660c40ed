"""What any Slurm cluster must pass: the tests' own, and with `pytest -m slurm --cluster NAME` the user's."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import AnyCluster
from tests.jobs.slurm.test_script import AWKWARD
from tests.jobs.submitting import SUBMIT, submit, wait_until

DEADLINE_S = 1500
"""A real cluster's queue may take its time; each of these jobs runs for seconds."""
SHAPE = ["--nodes", "2", "--gpus-per-node", "1"]

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(DEADLINE_S + 60)]


def followed(cluster: AnyCluster, *words: str, code: int = 0) -> dict[str, Any]:
    """A job of two hosts, waited for; its result.json and what was printed."""
    line = submit(cluster.directory, "mine:ENTRY", *cluster.words, *SHAPE, "--wait", *words, env=cluster.env)
    ended, out, err = line.finish(DEADLINE_S)
    assert ended == code, out + err
    return {**line.result(), "stdout": out, "stderr": err}


def test_two_hosts_do_their_work(any_cluster: AnyCluster) -> None:
    words = [word for name, value in AWKWARD.items() for word in ("--env", f"{name}={value}")]
    record = followed(any_cluster, f"names={json.dumps(list(AWKWARD))}", *words)
    assert (record["status"], record["nodes"], record["gpus_per_node"]) == ("done", 2, 1)
    assert len(set(record["result"]["hosts"])) == 2
    assert {name: record["result"][name] for name in AWKWARD} == AWKWARD
    run = any_cluster.directory / "run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert (run / "slurm.log").exists()
    assert all((run / "attempt-0" / f"rank-{rank}.log").read_text() for rank in range(2))


def test_a_rank_that_fails_ends_the_job_and_is_named(any_cluster: AnyCluster) -> None:
    record = followed(any_cluster, "does=raise", code=1)
    failure = record["failure"]
    assert (failure["rank"], failure["message"]) == (1, "ValueError: the third layer is missing")
    assert "act(config.does" in failure["traceback"]
    assert f"the job failed: rank 1 on {failure['host']}: ValueError" in record["stderr"].splitlines()[-1]


def test_one_may_leave_and_come_back(any_cluster: AnyCluster) -> None:
    words = [*any_cluster.words, *SHAPE, "--wait", "steps=100", "pause_seconds=0.05"]
    line = submit(any_cluster.directory, "mine:ENTRY", *words, env=any_cluster.env)
    wait_until(line.metrics, "the first step", DEADLINE_S)
    line.process.send_signal(signal.SIGINT)
    code, _, err = line.finish(60)
    assert code == 130
    assert f"follow it: python {SUBMIT} wait run" in err
    back = subprocess.run(
        [sys.executable, SUBMIT, "wait", "run", "--json"],
        cwd=any_cluster.directory,
        env=any_cluster.env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["status"] == "done"
