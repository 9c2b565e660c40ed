"""A sweep on Slurm: one array, whose jobs are requeued, cancelled, submitted again and waited for one by one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.cli import sweeping
from tests.jobs.submitting import SUBMIT
from tests.slurm.harness import Cluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2sT"


def test_the_life_of_an_array(slurm: Cluster, tmp_path: Path) -> None:
    shutil.copy(str(sweeping.__file__), tmp_path / "mine.py")
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "80", "HF_TOKEN": TOKEN}

    def typed(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, SUBMIT, *words], cwd=tmp_path, env={**slurm.env, **state}, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())

    def record(name: str) -> dict[str, object]:
        return dict(json.loads((tmp_path / "sweep" / name / "result.json").read_text()))

    def states() -> list[str]:
        return [point["state"] for point in json.loads(typed("status", "sweep", "--json"))["points"]]

    go = tmp_path / "go"
    words = ["mine:ENTRY", "--nodes", "2", "--gpus-per-node", "1", "lr=1,2", "seed=1..2", "fails=2 2"]
    words += ["steps=9", f"waits_for={go}", "--env", f"HF_TOKEN={TOKEN}", "--parallel", "2"]
    said = typed(*words, "--run-dir", "sweep")
    job = said.partition("submitted job ")[2].partition(",")[0]
    assert f"submitted job {job}, an array of 0-3%2 " in said
    secrets = [tmp_path / "sweep" / name / "secrets.json" for name in "0123"]
    assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600] * 4
    assert TOKEN not in slurm.run("scontrol", "--oneliner", "show", "job", job)

    # An element that waits is a run like any other.
    assert states()[2:] == ["PENDING", "PENDING"]
    limited = "as many jobs of its array run as may run at once"  # Slurm says so once it has looked at the job
    wait_until(lambda: limited in typed("explain", f"{job}_3"), 60, "Slurm says why the last one waits")
    assert f"'{job}' is a sweep of 4 points; name one of them, sweep/0 to sweep/3" in typed("explain", job, code=2)
    assert "sweep/2: cancelled job" in typed("cancel", f"{job}_2")
    assert "sweep/2 has ended and is not done (CANCELLED)" in typed("mine:ENTRY", "--after", job, code=2)
    typed("mine:ENTRY", "--after", "sweep/3", "--run-dir", "never")
    typed("mine:ENTRY", "--after", "sweep/0", "--after", "sweep/1", "--run-dir", "then")
    assert f"It depends on afterok:{job}_0(unfulfilled),afterok:{job}_1(unfulfilled)" in typed("explain", "then")

    # So is one that is requeued, while the other goes on.
    wait_until(lambda: (tmp_path / "sweep/0/metrics.jsonl").exists(), 90, "point 0 takes a step")
    slurm.run("scontrol", "requeue", f"{job}_0")
    wait_until(lambda: (tmp_path / "sweep/0/attempt-1").exists(), 90, "point 0 starts again")
    go.touch()
    said = typed("wait", job, code=1)
    assert states() == ["COMPLETED", "COMPLETED", "CANCELLED", "FAILED"]
    assert "point 3 (lr=2 seed=2): FAILED: rank 0 on node0: ValueError: it diverged (mine.py:" in said
    assert "* the lowest heldout_loss, 1: sweep/0 (lr=1 seed=1)" in said
    assert "2 of 4 points are not done; go on with one: " in said
    assert (record("0")["status"], record("0")["attempt"]) == ("done", 1)
    assert record("1")["attempt"] == 0
    assert record("2")["error"] == f"job {job}_2 was cancelled before it started"
    assert [path.exists() for path in secrets] == [False] * 4

    # What came after the point that failed never starts, and says why.
    slurm.wait_job_state(json.loads((tmp_path / "never/submission.json").read_text())["job_id"], "CANCELLED")
    assert "because a run that it was to start after has failed. It was to start after sweep/3" in typed(
        "explain", "never"
    )
    assert '"status": "done"' in typed("wait", "then", "--json")

    # The failed one is submitted again alone, and takes its place.
    typed("resubmit", f"{job}_3", "--env", "MENDED=1", "--wait")
    assert record("3.1")["status"] == "done"
    assert states() == ["COMPLETED", "COMPLETED", "CANCELLED", "COMPLETED"]
    assert "--after: done already" in typed("mine:ENTRY", "--after", "sweep/3.1", "--dry-run")
    assert TOKEN not in "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file() and path.name != "mine.py"
    )
