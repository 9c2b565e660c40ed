"""What is made of a run's files and of Slurm's answers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs.blame import Failure
from jobs.excluded import exclude
from jobs.run_dir import RunDirectory
from jobs.runs.overview import Overview, overviews
from jobs.slurm.query import Answer, Forgotten, JobState, NoAnswer
from tests.jobs.runs.some_runs import a_run
from tests.jobs.slurm.test_query import UNREACHABLE, say
from workloads.json_values import to_json

DONE = {"status": "done", "seconds": 5.0}
STOPPED = {"status": "stopped", "error": "by request, after step 7 of 9", "stopped_by": "SIGUSR1"}
UNDECIDED = {"status": "stopped", "error": "by request, after step 7 of 9", "stopped_by": "SIGTERM"}
FAILED = {"status": "failed", "error": "rank 1 on n1: ValueError: mine", "failure": {"rank": 1}}
VAGUE = {"status": "failed", "error": "job 12 ended"}
TIMED_OUT = {"status": "failed", "error": "job 12 reached its time limit", "slurm_state": "TIMEOUT"}
NOBODY = NoAnswer("squeue: No such file or directory")


def see(run: RunDirectory, answer: Answer | None = None) -> Overview:
    """What is known of one run, of which Slurm says `answer`; None: Slurm must not be asked."""

    def ask(scripts: Mapping[str, str]) -> dict[str, Answer]:
        assert answer is not None
        assert scripts == {"12": ".submission_file_12.sh"}
        return {"12": answer}

    return overviews([run], ask)[0]


@pytest.mark.parametrize(
    ("record", "answer", "state", "is_alive"),
    [
        # Slurm's own words for a job that has not ended, whatever they are.
        (None, JobState("PENDING", "Resources"), "PENDING", True),
        (None, JobState("RUNNING", nodes="n[0-1]"), "RUNNING", True),
        (None, JobState("STAGE_OUT"), "STAGE_OUT", True),
        (None, JobState("SOME_NEW_STATE"), "SOME_NEW_STATE", True),
        (DONE, JobState("COMPLETING"), "COMPLETING", True),
        ({**FAILED, "next_attempt": 1}, JobState("REQUEUED"), "REQUEUED", True),
        (FAILED, JobState("NODE_FAIL"), "NODE_FAIL", True),  # Slurm may start it again
        # How it ended: by its own result, or by Slurm's word where that says more.
        (DONE, JobState("COMPLETED"), "COMPLETED", False),
        (DONE, Forgotten(), "COMPLETED", False),
        (STOPPED, JobState("FAILED"), "STOPPED", False),
        (UNDECIDED, JobState("CANCELLED"), "CANCELLED", False),
        (UNDECIDED, Forgotten(), "STOPPED", False),
        (FAILED, JobState("TIMEOUT"), "FAILED", False),
        (VAGUE, JobState("OUT_OF_MEMORY"), "OUT_OF_MEMORY", False),
        (TIMED_OUT, Forgotten(), "TIMEOUT", False),
        (None, JobState("CANCELLED"), "CANCELLED", False),
        (None, JobState("NODE_FAIL", source="sacct"), "NODE_FAIL", False),
        # What nobody knows.
        (None, Forgotten(), "UNKNOWN", False),
        (None, NOBODY, "UNKNOWN", None),
        (DONE, NOBODY, "COMPLETED", None),
        ({**FAILED, "next_attempt": 1}, NOBODY, "UNKNOWN", None),
    ],
    ids=str,
)
def test_a_slurm_job(
    record: dict[str, Any] | None, answer: Answer, state: str, is_alive: bool | None, tmp_path: Path
) -> None:
    seen = see(a_run(tmp_path / "run", record=record, is_old=False), answer)
    assert (seen.state, seen.is_alive) == (state, is_alive)


def test_an_old_result_stands_without_slurm(tmp_path: Path) -> None:
    for name, record, state in (("a", DONE, "COMPLETED"), ("b", FAILED, "FAILED"), ("c", UNDECIDED, "STOPPED")):
        seen = see(a_run(tmp_path / name, record=record))
        assert (seen.state, seen.is_alive) == (state, False)
    assert seen.reason == "by request, after step 7 of 9"


def test_sruns_log_knows_what_slurm_has_forgotten(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    recorded = Path(__file__).parents[1] / "slurm" / "recorded" / "srun" / "time-limit.log"
    run.attempt(0).srun_log.write_text(recorded.read_text())
    run.slurm_log.write_text(
        "slurmstepd-node0: error: *** JOB 12 ON node0 CANCELLED AT 2026-11-22T11:25:46 DUE TO TIME LIMIT ***\n"
    )
    assert see(run, Forgotten()).state == "TIMEOUT"


def test_of_an_array_slurm_forgets_what_scancel_ended_before_it_began(tmp_path: Path) -> None:
    waited, began = (a_run(tmp_path / name, job_id=f"12_{name}") for name in "34")
    shutil.rmtree(waited.path / "attempt-0")
    seen = overviews([waited, began], lambda scripts: dict.fromkeys(scripts, Forgotten()))
    assert [(one.state, one.is_alive) for one in seen] == [("CANCELLED", False), ("UNKNOWN", False)]
    assert seen[0].reason == "job 12_3 was cancelled before it started"


def test_all_jobs_are_asked_about_at_once_and_the_lost_ones_of_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program, rows in (
        ("squeue", "1|RUNNING|x|n1|None|/r/.submission_file_1.sh\n2|PENDING|N/A||Priority|/other.sh"),
        ("sacct", "2|COMPLETED|n1|sbatch /other.sh\n3|TIMEOUT|n1|sbatch /r/.submission_file_3.sh\n4|RUNNING|n1|"),
    ):
        script = tmp_path / program
        script.write_text(f'#!/bin/sh\necho {program} "$@" >>{tmp_path}/asked\necho "{rows}"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs = [a_run(tmp_path / name, job_id=name) for name in "1234"]
    runs.append(a_run(tmp_path / "5", job_id="5", record=DONE))
    seen = overviews(runs)
    assert [one.state for one in seen] == ["RUNNING", "UNKNOWN", "TIMEOUT", "UNKNOWN", "COMPLETED"]
    assert [one.is_alive for one in seen] == [True, False, False, False, False]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["squeue", "sacct"]
    assert "--jobs=1,2,3,4 " in asked[0]
    assert "--jobs=2,3,4 " in asked[1]


def test_while_the_controller_is_down_accounting_is_believed_in_ends_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    site = {"SITE": str(tmp_path)}
    say(site, "squeue", err=UNREACHABLE, code=1)
    say(site, "sacct", "1|COMPLETED|n1|\n2|RUNNING|n1|\n3|NODE_FAIL|n1|")
    seen = overviews([a_run(tmp_path / name, job_id=name) for name in "123"])
    assert [(one.state, one.is_alive) for one in seen] == [("COMPLETED", False), ("UNKNOWN", None), ("UNKNOWN", None)]


@pytest.mark.parametrize(
    ("record", "state", "is_alive", "why"),
    [
        (DONE, "COMPLETED", False, ""),
        ({"status": "interrupted", "error": "interrupted by SIGINT"}, "CANCELLED", False, "interrupted by SIGINT"),
        ({"status": "nonsense"}, "UNKNOWN", False, ""),
        (None, "FAILED", False, "its agent has ended and left no result"),
    ],
    ids=str,
)
def test_a_local_job_that_has_ended(
    record: dict[str, Any] | None, state: str, is_alive: bool, why: str, tmp_path: Path
) -> None:
    # This process has that number, and was started with other arguments.
    seen = see(a_run(tmp_path / "run", executor="local", job_id=str(os.getpid()), record=record))
    assert (seen.state, seen.is_alive, seen.reason) == (state, is_alive, why)


def test_a_local_job_elsewhere_is_known_by_its_result_alone(tmp_path: Path) -> None:
    elsewhere: dict[str, Any] = {"executor": "local", "host": "elsewhere"}
    seen = see(a_run(tmp_path / "a", **elsewhere))
    assert (seen.state, seen.is_alive) == ("UNKNOWN", None)
    assert seen.reason == "was started on elsewhere, which alone knows whether it runs"
    assert see(a_run(tmp_path / "b", record=DONE, **elsewhere)).state == "COMPLETED"


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ({"executor": "debug"}, "--executor debug: it runs inside the command that started it"),
        ({"executor": "torchrun", "cluster": "none"}, "was started by torchrun, and has left no result"),
        ({}, "has no submission.json"),
    ],
)
def test_what_was_not_submitted_is_not_known_to_have_ended(job: dict[str, Any], why: str, tmp_path: Path) -> None:
    seen = see(a_run(tmp_path / "run", job_id="", **job))
    assert (seen.state, seen.is_alive) == ("UNKNOWN", None)
    assert why in seen.reason
    assert see(a_run(tmp_path / "done", job_id="", record=DONE, **job)).state == "COMPLETED"


def test_progress_is_that_of_the_last_lines(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 9.0 / step, "tokens_per_second": 1000.0 * step, "step_seconds": float(step)}
        for step in range(1, 31)
    ]
    rows.append({"step": 30, "heldout_loss": 0.25})
    run = a_run(tmp_path / "run", rows=rows, attempt=2)
    with run.attempt(2).metrics.open("a") as file:
        file.write('{"step": 31, "lo')  # as it is being written
    seen = see(run, JobState("RUNNING"))
    assert (seen.step, seen.total_steps, seen.loss, seen.restarts) == (30, 2000, 0.3, 2)
    assert (seen.rate, seen.rate_unit) == (30_000.0, "tokens/s")
    assert seen.step_seconds == pytest.approx(sum(range(23, 31)) / 8)
    assert seen.seconds_left == pytest.approx(1970 * sum(range(23, 31)) / 8)
    assert seen.metrics["heldout_loss"] == 0.25
    ended = see(run, JobState("FAILED"))
    assert ended.seconds_left is None


def test_progress_without_a_name_for_throughput_or_a_number_for_loss(tmp_path: Path) -> None:
    rows = [{"step": 4, "total_steps": 8, "train_loss": "nan", "step_seconds": 0.5}]
    seen = see(a_run(tmp_path / "run", rows=rows, settings={"path": "train.py", "args": []}, workload="script"), NOBODY)
    assert (seen.step, seen.total_steps, seen.loss) == (4, 8, None)
    assert (seen.rate, seen.rate_unit) == (2.0, "steps/s")
    assert seen.workload == "train.py"


def test_hosts_that_are_excluded(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    exclude(run, Failure(1, "n7", time.time(), "killed", "killed by SIGKILL"))
    assert see(run, JobState("PENDING")).excluded == ("n7",)
    assert see(run, JobState("FAILED")).excluded == ()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"resources": 3, "settings": [], "grace_s": "x"}', "\0\xff", "[" * 9999]
)
def test_damaged_files_are_no_error_and_nothing_is_changed(text: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", record=DONE, rows=[{"step": 1}])
    for path in (run.job, run.submission, run.attempt(0).result, run.attempt(0).metrics, run.attempt(0).status):
        path.write_text(text, encoding="latin-1")
    run.excluded.write_text(text, encoding="latin-1")
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in tmp_path.rglob("*")}
    seen = see(run)
    assert (seen.state, seen.is_alive, seen.step) == ("UNKNOWN", None, None)
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in tmp_path.rglob("*")} == before


def test_it_is_plain_data(tmp_path: Path) -> None:
    assert json.loads(json.dumps(to_json(asdict(see(a_run(tmp_path / "run"), NOBODY)))))["state"] == "UNKNOWN"
