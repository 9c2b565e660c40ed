"""A local job that goes on by itself, followed: by its process here, and by its result alone elsewhere."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import processes
from jobs.cli.main import main
from jobs.run_dir import RunDirectory, Submitted, write_json
from jobs.runs import result
from tests.jobs.submitting import ROOT, SUBMIT, Line

Capture = pytest.CaptureFixture[str]
Later = Callable[[float, Callable[[], Any]], None]
JOB = json.dumps({"workload": "mine", "settings": {"steps": 9}, "resources": {"nodes": 2, "gpus_per_node": 1}})
DONE = {"status": "done", "workload": "mine", "attempt": 0, "seconds": 5.0, "result": {"total": 3}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def wait_line(directory: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "submit.py"), "wait", "run", *words],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.dist
def test_a_local_job_that_nobody_waited_for(typed: Callable[..., Line], tmp_path: Path) -> None:
    line = typed("mine:ENTRY", "--gpus-per-node", "2", "steps=150", "pause_seconds=0.05", "--no-wait")
    code, out, _ = line.finish()
    assert code == 0
    assert f"follow it: python {SUBMIT} wait run" in out
    line.wait_for_step(2)
    leaves = wait_line(tmp_path)
    assert leaves.stdout is not None
    assert leaves.stdout.readline()  # it is following
    leaves.send_signal(signal.SIGINT)
    _, err = leaves.communicate(timeout=60)
    pid = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    assert leaves.returncode == 130
    assert err == (
        f"meshrun: interrupted by SIGINT; process {pid} keeps running; follow it: python {SUBMIT} wait run; "
        f"end it: python {SUBMIT} cancel run\n"
    )
    back = wait_line(tmp_path)
    out, err = back.communicate(timeout=120)
    assert (back.returncode, err) == (0, "")
    assert "step 150/150" in out
    assert "total: 450" in out


@pytest.mark.dist
def test_a_local_job_that_is_killed(typed: Callable[..., Line], tmp_path: Path) -> None:
    line = typed("mine:ENTRY", "steps=100000", "pause_seconds=0.05", "--no-wait")
    line.finish()
    line.wait_for_step(1)
    back = wait_line(tmp_path)
    assert back.stdout is not None
    assert back.stdout.readline()
    os.kill(int(json.loads((line.run_dir / "submission.json").read_text())["job_id"]), signal.SIGKILL)
    _, err = back.communicate(timeout=60)
    assert back.returncode == 1
    assert "the leader on host0: ended without a record: it was killed" in err.splitlines()[-1]


def local(tmp_path: Path, pid: int, argument: str, host: str = "") -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.attempt(0).make()
    run.job.write_text(JOB)
    run.record_submission(Submitted("local", str(pid), "", host or socket.gethostname(), argument))
    return run


def test_a_process_that_only_has_the_same_number_is_another(tmp_path: Path, capsys: Capture) -> None:
    local(tmp_path, os.getpid(), "another's")
    assert main(["wait", "run"]) == 1
    assert "the leader on host0: ended without a record: it was killed" in capsys.readouterr().err


@pytest.fixture
def disk_is_full() -> Iterator[None]:
    """No file can become longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def failed_run(tmp_path: Path) -> RunDirectory:
    """A local job whose agent has ended and could still write to its log."""
    run = local(tmp_path, os.getpid(), "another's")
    run.attempt(0).agent_log().write_text("Traceback\njobs.errors.JobFailed: rank 1 on host0: ValueError: mine\n")
    return run


@pytest.mark.parametrize("has_log", [True, False])
def test_a_full_disk_does_not_hide_the_failure(
    has_log: bool, failed_run: RunDirectory, capsys: Capture, disk_is_full: None
) -> None:
    log = failed_run.attempt(0).agent_log()
    if not has_log:
        log.unlink()
    assert main(["wait", "run"]) == 1
    fault = f"{failed_run.path} cannot be written to: File too large"
    without = f"the leader on host0: ended without a record, as {fault} (log: {log})"
    failure = f"rank 1 on host0: ValueError: mine; {fault}" if has_log else without
    assert capsys.readouterr().err.endswith(f"the job failed: {failure}\n")
    assert not failed_run.attempt(0).result.exists()


def test_an_interrupted_local_job(tmp_path: Path, capsys: Capture) -> None:
    run = local(tmp_path, 1, "")
    write_json(
        run.attempt(0).result, {"status": "interrupted", "workload": "mine", "attempt": 0, "error": "by SIGTERM"}
    )
    assert main(["wait", "run"]) == 1
    assert capsys.readouterr().err == "meshrun: error: the job was interrupted: by SIGTERM\n"


def test_a_local_job_of_another_box_is_known_by_its_result(tmp_path: Path, later: Later, capsys: Capture) -> None:
    run = local(tmp_path, os.getpid(), sys.argv[0], host="elsewhere")
    later(1.0, lambda: write_json(run.attempt(0).result, DONE))
    assert main(["wait", "run"]) == 0
    assert "the job runs on elsewhere" in capsys.readouterr().out


def test_of_a_stopped_agent_it_is_said_how_it_goes_on(
    tmp_path: Path, later: Later, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    sleeper = subprocess.Popen(["sleep", "600"])
    sleeper.send_signal(signal.SIGSTOP)
    run = local(tmp_path, sleeper.pid, "600")
    write_json(run.attempt(0).make().result, DONE)
    monkeypatch.setattr(result, "LINGERS_S", 0.1)
    later(3.0, sleeper.kill)
    assert main(["wait", "run"]) == 0
    agent = sleeper.pid
    assert f"the job's agent, process {agent}, is stopped; let it go on: kill -CONT {agent}" in capsys.readouterr().out
    sleeper.wait()


def test_a_job_whose_agent_runs_has_not_failed_also_where_there_is_no_proc(
    tmp_path: Path, later: Later, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    open_text = Path.read_text

    def without_proc(path: Path, *words: Any, **more: Any) -> str:
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)
        return open_text(path, *words, **more)

    monkeypatch.setattr(Path, "read_text", without_proc)
    sleeper = subprocess.Popen(["sleep", "600"])
    run = local(tmp_path, sleeper.pid, "600")
    monkeypatch.setattr(result, "LINGERS_S", 0.1)
    later(1.5, lambda: write_json(run.attempt(0).result, DONE))
    later(3.0, sleeper.kill)
    assert main(["wait", "run"]) == 0
    assert "the work is done, but threads or exit hooks of a rank are still running" in capsys.readouterr().out
    # It has ended, and nobody has asked how.
    assert not processes.runs(sleeper.pid, "600")
    sleeper.wait()
    assert not processes.runs(sleeper.pid, "600")


def test_the_result_of_a_run_by_an_earlier_version_is_found(tmp_path: Path) -> None:
    """It lies only at the top; a second attempt's is then another."""
    run = local(tmp_path, 10**9, "gone")
    run.attempt(0).make()
    write_json(run.result, DONE)
    assert result.Result(run).read() == DONE
    run.attempt(1).make()
    assert result.Result(run).read() is None
