"""`status` and `cancel` on a real Slurm: jobs in every stage of their lives, seen by one squeue."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.run_dir import RunDirectory
from tests.jobs import sample_workload
from tests.jobs.submitting import SUBMIT, wait_until
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_jobs_are_seen_by_one_squeue_and_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    shutil.copy(str(sample_workload.__file__), tmp_path / "mine.py")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nPATH="${{PATH#*:}}"\nexec squeue "$@"\n'
    )
    (programs / "squeue").chmod(0o755)
    env = {**slurm.env, "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "200"}
    env["PATH"] = f"{programs}:{env['PATH']}"

    def type_line(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, SUBMIT, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(name: str, *words: str) -> RunDirectory:
        type_line("mine:ENTRY", "--no-wait", "--run-dir", f"runs/{name}", *words)
        return RunDirectory(tmp_path / "runs" / name)

    def job(run: RunDirectory) -> str:
        submitted = run.submitted()
        assert submitted is not None
        return submitted.job_id

    ended = [start("done"), start("failed", "--gpus-per-node", "2", "does=raise")]
    for run, state in zip(ended, ("COMPLETED", "FAILED"), strict=True):
        slurm.wait_job_state(job(run), state, deadline_s=120)
    whole = ("--nodes", "2", "--gpus-per-node", "4", "steps=100000", "pause_seconds=0.1")
    running = start("running", *whole)
    wait_until(lambda: running.metrics.exists() and len(running.metrics.read_text().splitlines()) > 3, "steps", 120)
    waiting = start("waiting", *whole)
    wait_until(
        lambda: slurm.run("squeue", "--noheader", f"--jobs={job(waiting)}", "--format=%r").strip() != "None", "why"
    )
    (tmp_path / "asked").unlink(missing_ok=True)
    shown = type_line("status")
    assert (tmp_path / "asked").read_text().count("\n") == 1
    rows = {line.split()[0]: line for line in shown.splitlines()}
    assert [*rows] == ["RUN", "waiting", "running", "failed", "done"], shown
    assert " PENDING " in rows["waiting"]
    assert f" {job(waiting)} " in rows["waiting"]
    assert "Resources" in rows["waiting"] or "Priority" in rows["waiting"]
    assert " RUNNING " in rows["running"]
    assert "on node[0-1]" in rows["running"]
    assert "/100000 " in rows["running"]
    assert " FAILED " in rows["failed"]
    assert "rank 1 on node0: ValueError: the third layer is missing (mine.py:" in rows["failed"]
    assert " COMPLETED " in rows["done"]
    without_log = json.loads(type_line("logs", "waiting", "--json"))
    assert without_log["lines"] == []
    assert f"job {job(waiting)} is PENDING (" in without_log["reason"]

    cancelled = json.loads(type_line("cancel", "running", "waiting", "done", "--json"))
    assert [run["action"] for run in cancelled["runs"]] == ["asked", "cancelled", "ended"]
    # Slurm forgets it after some minutes.
    assert (waiting.recorded() or {})["error"] == f"job {job(waiting)} was cancelled before it started"
    slurm.wait_job_state(job(running), "CANCELLED", deadline_s=60)
    wait_until(lambda: running.recorded(), "the run's result")
    assert (running.recorded() or {})["status"] == "cancelled"
    again = type_line("cancel", "running", "waiting")
    assert again == "running: has ended already: CANCELLED\nwaiting: has ended already: CANCELLED\n"
