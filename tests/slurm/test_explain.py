"""`submit.py explain` of a job that waits, and of one that was cancelled, on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.submitting import SUBMIT, submit
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def explained(run: Path, cluster: Cluster) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, SUBMIT, "explain", str(run), "--json"], env=cluster.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def test_a_job_that_is_held_and_then_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    line = submit(tmp_path, "mine:ENTRY", "--sbatch", "hold", env=slurm.env)
    code, out, err = line.finish()
    assert code == 0, out + err
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    files = sorted(line.run_dir.rglob("*"))
    shown = explained(line.run_dir, slurm)
    assert (shown["kind"], shown["is_known"], shown["reason"]) == ("queue", True, "JobHeldUser")
    assert f"`scontrol release {job}`" in shown["sentences"][0]
    slurm.run("scancel", job)
    slurm.wait_job_state(job, "CANCELLED")
    shown = explained(line.run_dir, slurm)
    assert shown["kind"] == "cancelled"
    assert "before it started" in shown["sentences"][0]
    assert sorted(line.run_dir.rglob("*")) == files
