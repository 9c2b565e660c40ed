"""A user's own script on a real Slurm: torchrun's losses, a stop that it hears of, and another job that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.run_dir import RunDirectory
from tests.jobs.runs.test_feed import expected, tensorboards
from tests.jobs.submitting import SUBMIT, Line
from tests.slurm.harness import Cluster
from tests.test_scripts import LINES, SCRIPTS, losses, under_torchrun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

Submit = Callable[..., Line]


def test_losses_are_those_of_torchrun_under_any_distribution(slurm: Cluster, tmp_path: Path) -> None:
    jobs = []
    for distribution in ("block", "cyclic"):
        flags = ["--wait", "--nodes", "2", "--gpus-per-node", "2", "--sbatch", f"distribution={distribution}"]
        command = [sys.executable, SUBMIT, *flags, "--run-dir", distribution, "script", *LINES["ddp"]]
        jobs.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=slurm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        expected = under_torchrun("ddp", tmp_path)
        for distribution, job in zip(("block", "cyclic"), jobs, strict=True):
            shown, _ = job.communicate(timeout=180)
            assert job.returncode == 0, shown
            assert losses((tmp_path / distribution / "attempt-0/rank-0.log").read_text()) == expected
            assert "which the hosts may not see" in shown
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def test_a_script_that_is_cancelled_saves_and_another_job_goes_on(
    slurm: Cluster, typed: Submit, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    script = ["--track", "tensorboard", "script", str(SCRIPTS / "stoppable.py"), "60", "0.2"]
    line = typed("--wait", "--nodes", "2", "--gpus-per-node", "2", *script, env=slurm.env)
    line.wait_for_step(3, 120)
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    slurm.run("scancel", job)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    record = line.result()
    assert (record["status"], record["stopped_by"]) == ("cancelled", "SIGTERM")
    stopped_at = record["result"]["step"]
    assert record["error"] == f"job {job} was cancelled, after step {stopped_at}"
    again = [sys.executable, SUBMIT, "resume", "run", "--wait"]
    ended = subprocess.run(again, cwd=tmp_path, env=slurm.env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    weight = 0.0
    for row in rows:
        weight += (6 + 4 * row["step"]) / row["step"]
        assert row["weight"] == pytest.approx(weight, rel=1e-5)
    assert (line.result()["attempt"], "warnings" in line.result()) == (1, False)
    run = RunDirectory(line.run_dir)
    assert tensorboards(run) == expected(run)
    assert len(list(run.tensorboard.iterdir())) == 2  # a writer for each job, and none for a rank
