"""How runs are ended: by which signals and commands, and what is said of each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import processes
from jobs.run_dir import RunDirectory
from jobs.runs.cancel import cancel
from jobs.runs.overview import overviews
from tests.jobs.runs.some_runs import a_run
from tests.jobs.slurm.test_query import asked, say
from tests.jobs.submitting import wait_until

AGENT = """
import pathlib, signal, sys, time
stops = sys.argv[2] == "stops"
signal.signal(signal.SIGUSR1, lambda *_: stops and sys.exit())
pathlib.Path(sys.argv[1] + "-is-ready").touch()
while True:
    time.sleep(0.05)
"""
Start = Callable[..., RunDirectory]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts what a local run is to `cancel`: a process with the run directory among its arguments."""
    started = []

    def a_local_run(name: str, does: str, **job: Any) -> RunDirectory:
        path = tmp_path / name
        started.append(subprocess.Popen([sys.executable, "-c", AGENT, str(path), does]))
        run = a_run(path, executor="local", job_id=str(started[-1].pid), is_old=False, **job)
        wait_until(lambda: Path(f"{path}-is-ready").exists(), "the process is ready")
        return run

    yield a_local_run
    for process in started:
        process.kill()
        process.wait()


def test_local_runs_may_stop_by_themselves_and_are_ended_if_they_do_not(start: Start) -> None:
    stops, goes_on = start("stops", "stops", grace_s=60), start("goes on", "goes on", grace_s=0.2)
    told: list[str] = []
    assert [run.state for run in overviews([stops, goes_on])] == ["RUNNING", "RUNNING"]
    first, second = cancel(overviews([stops]), told.append)[0], cancel(overviews([goes_on]))[0]
    assert (first.action, first.what) == ("cancelled", f"process {first.run.job_id}: it has ended")
    assert told == ["waiting up to 60 s for ranks to end their step and save"]
    assert second.action == "cancelled"
    assert second.what == f"process {second.run.job_id} was ended, because its ranks did not stop when asked"
    assert overviews([goes_on])[0].state == "CANCELLED"
    assert (goes_on.recorded() or {})["error"] == "cancelled by submit.py cancel"
    again = cancel(overviews([stops, goes_on]))
    assert [one.what for one in again] == ["has ended already: FAILED", "has ended already: CANCELLED"]


def test_another_process_with_the_number_is_left_alone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = start("theirs", "stops")
    submitted = theirs.submitted()
    assert submitted is not None
    ours = a_run(tmp_path / "ours", executor="local", job_id=submitted.job_id)
    stale = overviews([theirs])[0]
    assert cancel(overviews([ours]))[0].action == "ended"
    # Also if the number is another run's only by the time that the signal would be sent.
    theirs.record_submission(submitted.now("local", "999999999", str(theirs.path)))
    sent: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *call: sent.append(call))
        assert cancel([stale])[0].action == "cancelled"
    assert sent == []
    assert processes.runs(int(submitted.job_id), submitted.process_argument)


def test_what_may_run_and_cannot_be_reached_is_a_failure(tmp_path: Path) -> None:
    elsewhere = a_run(tmp_path / "a", executor="local", host="elsewhere")
    debug = a_run(tmp_path / "b", executor="debug", job_id="")
    done = cancel(overviews([elsewhere, debug]))
    assert [one.is_well for one in done] == [False, False]
    assert done[0].what.endswith("; cancel it on elsewhere")
    assert "it runs inside the command that started it" in done[1].what


ROWS = """\
1|{}|x||None|/r/.submission_file_1.sh
2|{}|x|n[0-1]|None|/r/.submission_file_2.sh
3|COMPLETED|x|n1|None|/r/.submission_file_3.sh
4|RUNNING|x|n1|None|/r/.submission_file_4.sh
5|COMPLETING|x|n1|None|/r/.submission_file_5.sh"""


def test_slurm_jobs_are_cancelled_by_one_scancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = {"SITE": str(tmp_path)}
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs = [a_run(tmp_path / "runs" / name, job_id=name, is_old=False) for name in "12345"]
    runs[0].attempt(0).path.joinpath("failures").rmdir()
    runs[0].attempt(0).path.rmdir()  # it has not begun
    say(site, "squeue", ROWS.format("PENDING", "RUNNING"))
    before = overviews(runs)
    say(site, "squeue", ROWS.format("CANCELLED", "RUNNING"))
    say(site, "scancel", err="scancel: error: Kill job error on job id 4: Access/permission denied", code=1)
    done = cancel(before)
    assert asked(site) == ["squeue", "scancel", "squeue"]
    assert (tmp_path / "asked").read_text().splitlines()[1] == "scancel 1 2 4"
    assert [(one.action, one.what) for one in done] == [
        ("cancelled", "cancelled job 1, which was PENDING"),
        ("asked", "job 2 is being cancelled; its ranks may save within 20 s"),
        ("ended", "has ended already: COMPLETED"),
        (
            "failed",
            "job 4 was not cancelled: scancel: error: Kill job error on job id 4: Access/permission denied",
        ),
        ("ended", "job 5 is ending already: COMPLETING"),
    ]
    # What is left of a job that never began says so for ever.
    assert (runs[0].recorded() or {})["error"] == "job 1 was cancelled before it started"
    assert [run.recorded() for run in runs[1:]] == [None] * 4


def test_without_slurms_answer_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = {"SITE": str(tmp_path)}
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = a_run(tmp_path / "run", is_old=False)
    say(site, "squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    say(site, "sacct", err="sacct: error: no", code=1)
    done = cancel(overviews([run]))[0]
    assert done.action == "failed"
    assert done.what.startswith("nothing was done: Slurm does not answer: ")
    assert done.what.endswith("; try again later, or run scancel 12")
    assert asked(site) == ["squeue", "sacct"]
