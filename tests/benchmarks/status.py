"""`status` over 1,000 run directories, beside a Python that only lists them and reads each one's files.

    python -m tests.benchmarks status

The other process has the same imports. It lists each run directory, and reads and parses the JSON files that `status`
reads, and the end of metrics.jsonl, in as few lines as that takes. A tenth of the runs are Slurm jobs that have not
ended; a squeue of the benchmark's own answers for them and counts how often it was called. What is counted is processor
time, as in `command_line`, which also measures the --help of each verb.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.run_dir import RunDirectory, Submitted, write_json
from tests.benchmarks.command_line import SUBMIT, seconds
from tests.benchmarks.rows import Row, milliseconds

RUNS, QUEUED_EVERY = 1000, 10
STEPS = 300
AT_MOST = 2.0
JOB = ("tp_fsdp", "--dry-run", "--json", "--executor", "slurm")
SQUEUE = """#!/bin/sh
echo squeue >>"$(dirname "$0")/calls"
exec cat "$(dirname "$0")/queue"
"""
LISTING = """
import json, os
import jobs.cli.main, jobs.cli.verbs.status

for run in os.scandir("runs"):
    newest = max((name for name in os.listdir(run.path) if name.startswith("attempt-")), default="attempt-0")
    names = ("job.json", "submission.json", "excluded.json", f"{newest}/result.json")
    for name in names:
        try:
            with open(f"{run.path}/{name}", "rb") as file:
                json.loads(file.read())
        except FileNotFoundError:
            pass
    with open(f"{run.path}/{newest}/metrics.jsonl", "rb") as file:
        file.seek(-8192, os.SEEK_END)
        [json.loads(line) for line in file.read().splitlines()[-10:]]
"""


def a_run(path: Path, job: dict[str, Any], has_ended: bool) -> None:
    """A run directory as a job leaves it, or in the middle of its work."""
    run = RunDirectory(path)
    path.mkdir(parents=True)
    attempt = run.begin_attempt()
    run.submitit.mkdir()
    write_json(run.job, {**job, "run_dir": str(path)})
    rows = (
        {"step": step, "loss": 2.5, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 5000.0, "step_seconds": 0.5}
        for step in range(1, STEPS + 1)
    )
    attempt.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(attempt.status, {"written": 1.0, "running": 8, "phases": {}, "last_step": STEPS, "behind": []})
    if has_ended:
        run.publish({"status": "done", "workload": job["workload"], "attempt": 0, "seconds": 150.0, "result": {}})
        os.utime(attempt.result, (1, 1))  # long ago: Slurm need not be asked


def prepare(folder: Path) -> None:
    """Makes the run directories, as copies of two, and Slurm's programs beside them."""
    shown = subprocess.run([sys.executable, SUBMIT, *JOB], cwd=folder, check=True, capture_output=True, text=True)
    job = json.loads(shown.stdout)["job"]
    for has_ended in (False, True):
        a_run(folder / str(has_ended), job, has_ended)
    queue = []
    for number in range(1000, 1000 + RUNS):
        run, is_queued = RunDirectory(folder / "runs" / f"20261128-{number:06}-tp_fsdp"), number % QUEUED_EVERY == 0
        shutil.copytree(folder / str(not is_queued), run.path, symlinks=True)
        run.submission.write_text(json.dumps(asdict(Submitted.now("slurm", str(number)))))
        script = run.submitit / f".submission_file_{number}.sh"
        script.touch()
        if is_queued:
            queue.append(f"{number}|RUNNING|2026-11-28T08:15:30|node[0-1]|None|{script}\n")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "queue").write_text("".join(queue))
    for program in ("squeue", "sacct"):
        (programs / program).write_text(SQUEUE)
        (programs / program).chmod(0o755)


def main(rounds: int = 7) -> list[Row]:
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = folder / "bin" / "calls"
        prepare(folder)
        os.environ |= {"PATH": f"{folder / 'bin'}:{before['PATH']}", "XDG_STATE_HOME": str(folder / "state")}
        os.environ["PYTHONPATH"] = str(Path(SUBMIT).parent)
        try:
            ours, theirs = [SUBMIT, "status", "--limit", str(RUNS)], ["-c", LISTING]
            for command in (ours, theirs):
                seconds(command, folder)  # compiles
            calls.unlink()
            measured = [(seconds(ours, folder), seconds(theirs, folder)) for _ in range(rounds)]
        finally:
            os.environ.clear()
            os.environ.update(before)
        asked = len(calls.read_text().splitlines()) / rounds
    ours_s, theirs_s = zip(*measured, strict=True)
    ratio = statistics.median(ours_s) / statistics.median(theirs_s)
    detail = f"{milliseconds(ours_s)} against {milliseconds(theirs_s)} of processor time"
    return [
        Row(
            what=f"status over {RUNS:,} run directories",
            against="listing and reading them",
            ratio=ratio,
            at_most=AT_MOST,
            detail=detail,
        ),
        Row(
            what="calls of Slurm's programs by a status",
            against="one",
            ratio=asked,
            at_most=1.0,
            detail=f"{asked:g} for {RUNS // QUEUED_EVERY} jobs that have not ended",
        ),
    ]
