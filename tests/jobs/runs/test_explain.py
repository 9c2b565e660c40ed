"""A run directory, in whatever state, is explained from what it holds, and stays as it is."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import blame
from jobs.run_dir import RunDirectory, write_json
from jobs.runs.explain import explain, facts_of

JOB = {"workload": "mine:ENTRY", "resources": {"nodes": 2, "gpus_per_node": 2, "time_min": 10}, "max_restarts": 0}
CANCELLED = "slurmstepd: error: *** JOB 7 ON node0 CANCELLED AT 2026-11-28T05:00:00 DUE TO TIME LIMIT ***\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A local run of which nothing is left but its description; its agent is gone."""
    run = RunDirectory(tmp_path / "run")
    run.attempt(0).make()
    write_json(run.job, {**JOB, "executor": "local"})
    submit(run, "local", "999999999")
    return run


def submit(run: RunDirectory, executor: str, job_id: str, host: str = "") -> None:
    host = host or socket.gethostname()
    record = {"executor": executor, "job_id": job_id, "submitted": "2026-11-28T05:00:00Z", "host": host}
    write_json(run.submission, {**record, "process_argument": "no such argument"})


def fail(run: RunDirectory, attempt: int = 0, **record: Any) -> blame.Failure:
    """Rank 3 raises; its log has the line."""
    at = run.attempt(attempt).make()
    at.log(3).write_text("begin\n12:00:00 [rank 3/4 node 1] ERROR: this rank ends: ValueError: on purpose\n")
    failure = blame.failure_of(ValueError("on purpose"), 3, "node1", time.time(), str(at.log(3)))
    error = failure.headline()
    result = {"status": "failed", "attempt": attempt, "error": error, "failure": failure.to_json(), **record}
    write_json(at.result, result)
    return failure


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


def test_a_failure_is_found_with_its_line_and_nothing_is_changed(run: RunDirectory) -> None:
    fail(run)
    before = content(run.path)
    cause = explain(run)
    assert (cause.kind, cause.rank, cause.host) == ("exception", 3, "node1")
    assert (cause.log, cause.log_line) == (str(run.attempt(0).log(3)), 2)
    assert content(run.path) == before


def test_a_directory_that_was_moved(run: RunDirectory, tmp_path: Path) -> None:
    fail(run)
    moved = RunDirectory(run.path.rename(tmp_path / "elsewhere"))
    assert explain(moved).log == str(moved.attempt(0).log(3))


def test_an_earlier_attempt(run: RunDirectory) -> None:
    fail(run, next_attempt=1, decision="restarted as attempt 1 (restart 1 of 3)")
    run.attempt(1).make()
    write_json(run.attempt(1).result, {"status": "done", "attempt": 1, "seconds": 3.0})
    assert explain(run, 0).kind == "exception"
    cause = explain(run)
    assert cause.kind == "done"
    assert cause.sentences[-1].startswith("This is attempt 1; attempt 0 had ended: rank 3 on node1: ValueError")


def test_an_agent_that_ended_without_a_word(run: RunDirectory) -> None:
    before = content(run.path)
    cause = explain(run)
    assert (cause.kind, cause.is_known) == ("unknown", False)
    assert content(run.path) == before


def test_a_run_of_another_machine(run: RunDirectory) -> None:
    submit(run, "local", "1", host="elsewhere")
    assert "elsewhere, which alone knows" in explain(run).sentences[0]
    write_json(run.attempt(0).status, {"written": time.time(), "phases": {"starting": 4}, "last_step": -1})
    assert explain(run).kind == "starting"


def test_a_standstill_that_is_over(run: RunDirectory) -> None:
    """Of a script no steps are known: if it still stood still, its leader would have said so again."""
    submit(run, "local", "1", host="elsewhere")
    attempt = run.attempt(0)
    write_json(attempt.status, {"written": time.time(), "phases": {"script": 4}, "last_step": -1})
    said = "no movement for 45 s: rank 3 on host1 is in the script (train.py:37, act); 3 ranks wait in all_reduce"
    attempt.agent_log().write_text(f"begin\n12:00:00 [agent] WARNING: {said}\n")
    attempt.stacks.write_text("stacks")
    cause = explain(run)
    assert (cause.kind, cause.rank, cause.host, cause.file, cause.line) == ("standstill", 3, "host1", "train.py", 37)
    assert cause.log_line == 2
    long_ago = time.time() - 200
    os.utime(attempt.stacks, (long_ago, long_ago))
    assert explain(run).kind == "starting"


def test_a_run_that_was_never_submitted(run: RunDirectory) -> None:
    run.submission.unlink()
    assert "no submission.json" in explain(run).sentences[0]


def test_a_slurm_job_years_later_without_slurm(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    submit(run, "slurm", "7")
    cause = explain(run)
    assert (cause.kind, cause.is_known) == ("unknown", False)
    assert "Slurm does not answer here" in cause.sentences[0]
    run.slurm_log.write_text("set up\n" + CANCELLED)
    run.attempt(0).srun_log.write_text("srun: Job step aborted: Waiting up to 4 seconds for job step to finish.\n")
    before = content(run.path)
    cause = explain(run)
    assert (cause.kind, cause.file, cause.line) == ("time_limit", str(run.slurm_log), 2)
    assert content(run.path) == before


def test_what_slurm_says_last_is_not_about_an_earlier_attempt(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempt 0 left nothing; the time limit was attempt 1's."""
    monkeypatch.setenv("PATH", "/nonexistent")
    submit(run, "slurm", "7")
    run.slurm_log.write_text(CANCELLED)
    for number in (0, 1):
        run.attempt(number).make().srun_log.write_text("srun: Job step aborted: Waiting up to 4 seconds\n")
    assert explain(run, 0).kind == "unknown"
    cause = explain(run)
    assert cause.kind == "time_limit"
    assert "attempt 0" not in " ".join(cause.sentences)


def test_what_is_damaged_is_left_out(run: RunDirectory) -> None:
    """Half-written, empty, of another type, not UTF-8, or not readable at all: no traceback."""
    fail(run)
    attempt = run.attempt(0)
    whole = {path: path.read_bytes() for path in (run.job, run.submission, attempt.result)}
    extra = [attempt.failure_record, attempt.status, attempt.metrics, attempt.failure(2), attempt.agent_log()]
    for path in [*whole, *extra]:
        for text in (b"", b'{"status": "fai', b"[1, 2]", b"\xff\xfe\x00", b'{"failure": 3, "status": 4, "behind": 5}'):
            path.write_bytes(text)
            explain(run)
        path.unlink()
        explain(run)
        if path in whole:
            path.write_bytes(whole[path])
    attempt.log(3).unlink()
    attempt.log(3).mkdir()
    assert explain(run).kind == "exception"


def test_a_very_long_log_is_searched(run: RunDirectory) -> None:
    fail(run)
    log = run.attempt(0).log(3)
    with log.open("wb") as file:
        file.write((b"x" * 100 + b"\n") * 200_000)
        file.write(b"12:00:00 ERROR: this rank ends: ValueError\n" + os.urandom(100_000))
    began = time.monotonic()
    assert explain(run).log_line == 200_001
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"status": "done", "seconds": 3.0, "warnings": ["rank 1 died"]}, "done"),
        ({"status": "stopped", "stopped_by": "the workload", "error": "by request, after step 3"}, "stopped"),
        (
            {"status": "stopped", "stopped_by": "time limit", "error": "before its time limit, after step 3"},
            "time_limit",
        ),
        ({"status": "stopped", "stopped_by": "preemption", "error": "by a preemption, after step 3"}, "preemption"),
        ({"status": "interrupted", "error": "interrupted by SIGINT"}, "interrupted"),
        ({"status": "cancelled", "error": "job 7 was cancelled by me, after step 3"}, "cancelled"),
        ({"status": "failed", "error": "the scheduler has started this job again (attempt 1)"}, "superseded"),
        ({"status": "unheard of"}, "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_way_to_end(record: dict[str, Any], kind: str, run: RunDirectory) -> None:
    write_json(run.attempt(0).result, {"attempt": 0, **record})
    assert explain(run).kind == kind
    facts_as_text = json.dumps(facts_of(run).record)
    assert record["status"] in facts_as_text
