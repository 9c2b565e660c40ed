"""Run directories as jobs leave them, without any job."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.run_dir import RunDirectory, Submitted, write_json

JOB = {
    "workload": "tp_fsdp",
    "settings": {"steps": 2000},
    "resources": {"nodes": 2, "gpus_per_node": 4},
    "executor": "slurm",
    "cluster": "/c/slurm.yaml",
    "grace_s": 20.0,
}
LONG_AGO = 1_700_000_000


def a_run(
    path: Path,
    *,
    job_id: str = "12",
    executor: str = "slurm",
    host: str = "",
    record: dict[str, Any] | None = None,
    rows: Sequence[dict[str, Any]] = (),
    attempt: int = 0,
    is_old: bool = True,
    **job: Any,
) -> RunDirectory:
    """A run directory.

    Args:
        path: where.
        job_id: as recorded at the submission; empty: it was not submitted.
        executor: the same.
        host: where it was submitted; this machine by default.
        record: the newest attempt's result, but for what every result has.
        rows: of metrics.jsonl.
        attempt: the newest attempt's number.
        is_old: whether its files are.
        job: what job.json has in other words than JOB.
    """
    path.mkdir(parents=True)
    run = RunDirectory(path)
    write_json(run.job, {**JOB, "executor": executor, "run_dir": str(path), **job})
    run.settings.touch()
    if job_id:
        when, host = "2026-11-22T08:15:30Z", host or socket.gethostname()
        run.record_submission(Submitted(executor, job_id, when, host, str(path) if executor == "local" else ""))
        if executor == "slurm":
            run.submitit.mkdir()
            (run.submitit / f".submission_file_{job_id}.sh").touch()
    for number in range(attempt + 1):
        run.attempt(number).make()
    newest = run.attempt(attempt)
    if rows:
        newest.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if record is not None:
        run.publish({"workload": "tp_fsdp", "attempt": attempt, **record})
    run.show_newest()
    if is_old:
        for file in (run.job, run.submission, newest.metrics, newest.result):
            if file.exists():
                os.utime(file, (LONG_AGO, LONG_AGO))
    return run
