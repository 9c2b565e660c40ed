"""How a Slurm job ended: srun's words as they were recorded, ranks' records, Slurm's state -> whom or what to name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import processes
from jobs.blame import Failure
from jobs.run_dir import RunDirectory, Submitted, read_json, write_json
from jobs.runs import outcome
from jobs.runs.outcome import Evidence, conclude, gather
from jobs.slurm import srun
from jobs.slurm.query import JobState
from jobs.slurm.srun import SrunWords
from tests.jobs.slurm.test_srun import RECORDED, recorded

NOW = 1000.0


def seen(name: str = "", failures: list[Failure] | None = None, state: str = "", **more: Any) -> Evidence:
    return Evidence(
        workload="mine",
        attempt=0,
        job_id="12",
        world_size=4,
        now=NOW,
        failures=failures or [],
        words=recorded(name) if name else SrunWords(),
        state=JobState(state) if state else None,
        hosts=("node0", "node0", "node1", "node1"),
        logs={rank: f"/run/rank-{rank}.log" for rank in range(4)},
        srun_log="/run/srun.log",
        slurm_log="/run/slurm.log",
        **{"status": 143, **more},
    )


def error(rank: int, when: float = 500.0, message: str = "ValueError: mine") -> Failure:
    return Failure(rank, f"node{rank // 2}", when, "error", message, f"Traceback of {rank}", f"/run/rank-{rank}.log")


def lost(rank: int, when: float = 400.0) -> Failure:
    return Failure(rank, f"node{rank // 2}", when, "lost_peer", "RuntimeError: Connection closed by peer", "T", "")


UNREACHABLE = replace(
    lost(3), kind="unreachable", message="rank 0 announced itself, and it cannot be reached from here"
)

LATE_CANCEL = srun.read(
    "srun: error: node0: task 0: Exited with exit code 1\n"
    "srun: Terminating StepId=12.0\n"
    "srun: got SIGCONT\n"
    "srun: forcing job termination\n"
    "srun: error: node1: tasks 2-3: Terminated\n"
)
"""A cancellation that one rank felt before srun did; put together, as no run has shown it yet."""


# --- whom to name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        (seen("raise", [error(3)]), "rank 3 on node1: ValueError: mine (log: /run/rank-3.log)"),
        (seen("raise", [error(3), lost(0), lost(1)]), "rank 3 on node1: ValueError: mine (log: "),
        # Nothing on disk: srun's word has to do.
        (seen("raise"), "rank 3 on node1: exited with code 1 before its work was done (log: /run/rank-3.log)"),
        (seen("sys-exit"), "rank 3 on node1: exited with code 3 before"),
        (seen("SIGKILL"), "rank 3 on node1: killed by SIGKILL (out of memory, or someone's kill -9) (log: "),
        (seen("SIGSEGV", [lost(0), lost(2)]), "rank 3 on node1: killed by SIGSEGV (log: "),
        (seen("SIGABRT"), "rank 3 on node1: killed by SIGABRT (log: "),
        (seen("SIGTERM"), "rank 3 on node1: killed by SIGTERM (someone's kill, or the scheduler's)"),
        (seen("SIGKILL-of-two"), "rank 3 on node1: killed by SIGKILL"),
        (
            seen("SIGKILL", done=frozenset({3})),
            "killed by SIGKILL (out of memory, or someone's kill -9) after its work was done",
        ),
        # A kill comes before the error that somebody makes of the loss; an error before the kills that follow it.
        (seen("SIGKILL", [error(0, message="ValueError: no answer")]), "rank 3 on node1: killed by SIGKILL"),
        (seen("SIGABRT", [error(0)]), "rank 0 on node0: ValueError: mine"),
        (seen("SIGTERM", [error(0)]), "rank 0 on node0: ValueError: mine"),
        (
            seen("no-such-python", last_lines={2: "slurmstepd-node1: error: execve(): /no: No such file or directory"}),
            "rank 2 on node1: exited with code 2 before its work was done: slurmstepd-node1: error: execve(): /no: No",
        ),
        # A rank that nobody speaks of has left with 0, and those that it left were heard.
        (
            seen("os-exit-0", [lost(0)], done=frozenset({2, 3})),
            "rank 1 on node0: exited with code 0 before its work was done (log: /run/rank-1.log)",
        ),
        (seen(state="COMPLETED", status=0, done=frozenset({0, 2, 3})), "rank 1 on node0: exited with code 0 before"),
        # Silence is no success: what srun does not say may be missing, or of a host that could not be ended.
        (
            replace(
                seen(failures=[lost(0), lost(1)], last_steps={rank: (f"{8 - rank}", 41.0) for rank in range(4)}),
                words=srun.read(
                    "srun: error: node0: tasks 0-1: Exited with exit code 1\nsrun: Terminating StepId=12.0\n"
                    "srun: error: Timed out waiting for job step to complete\n"
                ),
            ),
            "rank 3 on node1: did not fail, but still ran (last in step 5, 41 s ago) when rank 0 gave up waiting; so ",
        ),
        (
            seen(failures=[lost(0), lost(1), lost(2)], last_steps={3: ("5", 41.0)}),
            "rank 3 on node1: ended and gave no reason (last in step 5, 41 s ago); /run/srun.log does not say how, "
            "nor of ranks that gave up on it",
        ),
        (
            seen("os-exit-0", [lost(0)], last_steps={1: ("7", 1.0), 2: ("6", 2.0), 3: ("7", 1.0)}),
            "rank 2 on node1: ended and gave no reason (last in step 6, 2 s ago); /run/srun.log does not say how, "
            "nor of rank 1, rank 3 (log: /run/rank-2.log)",
        ),
        # Nobody failed by himself.
        (
            seen("SIGTERM", [lost(3)], last_steps={rank: ("7" if rank == 2 else "8", 30.0) for rank in range(4)}),
            "rank 2 on node1: did not fail, but still ran (last in step 7, 30 s ago) when rank 3 gave up waiting; so "
            "did rank 0 on node0 (last in step 8, 30 s ago), rank 1 on node0 (last in step 8, 30 s ago): RuntimeError",
        ),
        (
            seen("SIGTERM", [lost(3)], done=frozenset({1}), last_steps={1: ("7", 30.0)}),
            "rank 1 on node0: returned from its work (last in step 7, 30 s ago) while rank 3 was still in its own, and",
        ),
        (
            seen("SIGTERM", [lost(0), UNREACHABLE]),
            "rank 3 on node1: rank 0 announced itself, and it cannot be reached from here",
        ),
        (seen("SIGTERM", [UNREACHABLE]), "rank 3 on node1: rank 0 announced itself, and it cannot be reached"),
        # What Slurm did.
        (seen("time-limit", state="TIMEOUT", time_min=90), "job 12 reached its time limit of 90 min; ask for more"),
        (seen("scancel", state="CANCELLED"), "job 12 was cancelled"),
        (seen("scancel"), "job 12 was cancelled"),
        (replace(seen(), logs={}, state=JobState("CANCELLED", by="0")), "job 12 was cancelled by root before it star"),
        (
            seen("scancel", [lost(1)], last_steps={0: ("9", 2.0)}),
            "job 12 was cancelled; rank 0 was last",
        ),
        (
            seen("batch-script-killed", state="FAILED", status=None, last_steps={0: ("9", 2.0)}),
            "the batch script of job 12 was killed (someone's kill, or its host's memory was used up); rank 0 was",
        ),
        (seen("step-cancelled", status=137), "srun of job 12 was told to end (someone's kill, or a scancel of the st"),
        (seen("step-cancelled", state="CANCELLED"), "job 12 was cancelled"),
        (seen("preemption", state="PREEMPTED"), "job 12 was preempted by Slurm"),
        (seen("node-failure", [lost(0)]), "node1 failed, and job 12 with it"),
        (seen("node-failure-after-an-echo", [lost(0)]), "node1 failed, and job 12 with it"),
        (seen("node-failure-after-an-echo", [error(0)]), "rank 0 on node0: ValueError: mine"),
        (replace(seen(failures=[lost(0)]), words=LATE_CANCEL), "job 12 was cancelled"),
        (seen(state="NODE_FAIL"), "a host of job 12's failed"),
        (seen(state="NODE_FAIL", down_hosts=("node0",)), "node0 failed, and job 12 with it"),
        (seen("node-failure", state="NODE_FAIL", down_hosts=("node0",)), "node1 failed, and job 12 with it"),
        (seen(state="BOOT_FAIL"), "a host of job 12's did not start"),
        (seen(state="DEADLINE"), "job 12 could not end before its deadline"),
        (seen(state="OUT_OF_MEMORY"), "job 12 used more memory than it asked for"),
        (seen("preemption-with-grace"), "every rank of job 12 got a SIGTERM: Slurm's, as when it preempts"),
        (replace(seen("SIGTERM"), state=JobState("RUNNING", preempted=True)), "job 12 was preempted by Slurm"),
        # A rank's own failure stands, whatever was done to the job afterwards.
        (seen("raise", [error(3)], state="CANCELLED"), "rank 3 on node1: ValueError: mine"),
        (seen("raise", [error(3)], state="NODE_FAIL"), "rank 3 on node1: ValueError: mine"),
        # What a rank says while Slurm ends it does not.
        (seen("scancel", [error(0, message="a worker was killed")], state="CANCELLED"), "job 12 was cancelled"),
        # srun itself.
        (
            seen("unknown-option", status=255),
            "job 12: srun ended with code 255: srun: unrecognized option '--bad-arg' (log: /run/srun.log)",
        ),
        (seen("too-many-nodes", status=1), "with code 1: srun: error: Only allocated 2 nodes asked for 4"),
        (seen(status=0, done=frozenset({0, 1, 3})), "rank 2 on node1: exited with code 0 before its work was done"),
        (
            seen(status=137),
            "job 12: srun ended with code 137 (SIGKILL) and no rank has given a reason (log: /run/srun.log)",
        ),
        (seen(status=7), "job 12: srun ended with code 7 and no rank has given a reason (log: /run/srun.log)"),
        (
            replace(seen(state="FAILED", status=None), logs={}, script_says="module: command not found"),
            "job 12 ended (FAILED) before any rank was started; its last words: module: command not found (log: ",
        ),
        (
            replace(seen(status=127), logs={}, script_says="module: command not found"),
            "job 12 ended before any rank was started; its last words: module: command not found (log: ",
        ),
        (
            replace(seen(status=127), logs={}, srun_began=True),
            "srun ended with code 127 and no rank has given a reason",
        ),
        (
            replace(seen(state="FAILED", status=None), logs={}, script_says="/bin/false"),
            "job 12 ended (FAILED) before any rank was started; its last words: /bin/false (log: ",
        ),
        (
            replace(seen(state="FAILED", status=None), logs={}, slurm_log_exists=False),
            "job 12 ended (FAILED), and its first host could not write /run/slurm.log; is the run directory",
        ),
        # Nothing failed, and there is no result.
        (
            replace(seen(status=0), logs={}, script_says="the licence is out"),
            "job 12 ended before any rank was started; its last words: the licence is out (log: /run/slurm.log)",
        ),
        (
            seen(status=0, done=frozenset(range(4))),
            "job 12: every rank finished its work, and none has left a result (log: /run/rank-0.log)",
        ),
        (seen(state="FAILED", status=None), "job 12 ended (FAILED), and no rank has left a result or said why"),
        (
            seen(status=7, fault="/run cannot be written to: No space left on device"),
            "job 12 ended, and no rank could say how: /run cannot be written to: No space left on device (log:",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_whom_or_what_the_record_names(evidence: Evidence, says: str) -> None:
    record = outcome.outcome(evidence)
    assert says in record["error"]
    assert record["status"] == "failed"
    failure = record["failure"]
    assert (failure is not None) == record["error"].startswith("rank ")
    if failure:
        assert record["error"] == Failure(**failure).headline()
        assert record["traceback"] == failure["traceback"]
    json.dumps(record, allow_nan=False)


def test_out_of_memory() -> None:
    words = srun.read("srun: error: node1: task 2: Out Of Memory\nsrun: Terminating StepId=12.0\n")
    record = outcome.outcome(replace(seen(), words=words))
    assert record["error"].startswith("rank 2 on node1: killed by SIGKILL: its host's memory")
    killed = outcome.outcome(seen("SIGKILL", state="OUT_OF_MEMORY"))
    assert killed["error"].startswith("rank 3 on node1: killed by SIGKILL: its host's memory")


def test_the_record_has_what_a_local_jobs_has() -> None:
    record = outcome.outcome(seen("raise", [error(3)]))
    assert {"status", "workload", "attempt", "error", "traceback", "failure"} <= set(record)
    assert record["traceback"] == "Traceback of 3"


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The run directory of a job of 2 x 2 whose rank 3 was killed."""
    run = RunDirectory.create(tmp_path / "run")
    write_json(run.job, {"workload": "mine", "resources": {"nodes": 2, "gpus_per_node": 2, "time_min": 5}})
    run.record_submission(Submitted("slurm", "12", "2026-11-22T08:15:30Z", "login"))
    begin(run, 0, "SIGKILL")
    return run


def begin(run: RunDirectory, attempt: int, name: str) -> None:
    there = run.attempt(attempt).make()
    there.srun_log.write_text((RECORDED / f"{name}.log").read_text())
    for rank in range(4):
        there.log(rank).write_text("the end\n")


def judge(run: RunDirectory, attempt: int = 0, **more: Any) -> dict[str, Any]:
    return conclude(run, gather(run, attempt, sleep=lambda _: None, **more))


def test_everything_is_read_and_the_record_is_left(run: RunDirectory) -> None:
    write_json(run.attempt(0).failure(0), lost(0).to_json())
    record = judge(run, status=137)
    assert record["error"].startswith("rank 3 on node1: killed by SIGKILL")
    assert record["error"].endswith(f"(log: {run.attempt(0).log(3)})")
    assert (record["job_id"], record["workload"], record["attempt"]) == ("12", "mine", 0)
    assert read_json(run.result) == record


def test_a_record_of_another_host_is_waited_for(run: RunDirectory) -> None:
    begin(run, 0, "raise")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            write_json(run.attempt(0).failure(3), error(3).to_json())

    evidence = gather(run, 0, status=143, sleep=sleep)
    assert [failure.rank for failure in evidence.failures] == [3]
    assert len(slept) == 3


def test_a_record_that_never_comes_is_not_waited_for_for_long(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, 0, "raise")
    monkeypatch.setattr(outcome, "RECORD_WITHIN_S", 0.2)
    assert judge(run)["error"].startswith("rank 3 on node1: exited with code 1")


def test_thousands_of_ranks_are_not_thousands_of_questions(run: RunDirectory, tmp_path: Path) -> None:
    """Of a file system that many hosts share, and that the ranks' own ends keep busy."""
    there, size = run.attempt(0), 4096
    write_json(run.job, {"workload": "mine", "resources": {"nodes": 512, "gpus_per_node": 8}})
    for rank in range(size):
        there.log(rank).touch()
    for rank in range(0, size, 2):
        there.done(rank).parent.mkdir(exist_ok=True)
        there.done(rank).touch()
    for rank in (3, 1001):
        write_json(there.failure(rank), lost(rank).to_json())
    code = "import pathlib, sys\nfrom jobs.runs import outcome\nfrom jobs.run_dir import RunDirectory\n"
    code += "asked = []\nwatched = ('open', 'os.listdir', 'os.scandir')\n"
    code += "is_path = lambda event, args: event in watched and type(args[0]) is not int\n"
    code += "sys.addaudithook(lambda event, args: asked.append(event) if is_path(event, args) else None)\n"
    code += "stat = pathlib.Path.stat\n"
    code += "pathlib.Path.stat = lambda path, **more: asked.append('stat') or stat(path, **more)\n"
    code += f"seen = outcome.gather(RunDirectory(pathlib.Path({str(run.path)!r})), 0, status=1)\n"
    code += "print(len(asked), len(seen.logs), len(seen.done), *[f.rank for f in seen.failures])\n"
    root = Path(outcome.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    asked, *found = map(int, done.stdout.split())
    assert found == [4096, 2048, 3, 1001]
    assert asked < 40


def test_of_a_job_whose_host_is_not_known_none_is_named(run: RunDirectory) -> None:
    write_json(run.job, {"workload": "mine", "resources": {"nodes": 1, "gpus_per_node": 4}})
    run.attempt(0).srun_log.write_text("")
    assert judge(run, status=0)["error"].startswith("rank 0 on a host: exited with code 0")


def test_a_damaged_record_is_none(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "RECORD_WITHIN_S", 0.0)
    run.attempt(0).failure(0).write_text('{"rank": 0}')
    run.attempt(0).failure(1).write_text("")
    assert judge(run)["error"].startswith("rank 3 on node1: killed by SIGKILL")


def test_why_slurm_ended_it_is_in_the_batch_scripts_own_log(run: RunDirectory) -> None:
    begin(run, 0, "time-limit")
    line = "slurmstepd-node0: error: *** JOB 12 ON node0 CANCELLED AT 2026-11-22T11:32:56"
    run.slurm_log.write_text(f"{line} DUE TO PREEMPTION ***\n{line} DUE TO TIME LIMIT ***\n")
    assert judge(run)["error"] == "job 12 reached its time limit of 5 min; ask for more with --time"


def test_a_result_that_is_done_stays(run: RunDirectory) -> None:
    write_json(run.result, {"status": "done", "attempt": 0})
    assert judge(run)["status"] == "done"
    assert read_json(run.result) == {"status": "done", "attempt": 0}


def test_a_later_attempts_record_stays(run: RunDirectory) -> None:
    begin(run, 1, "raise")
    write_json(run.result, {"status": "failed", "attempt": 1, "error": "later"})
    assert judge(run, 0)["error"] == "later"
    assert read_json(run.result)["error"] == "later"


def test_nothing_is_written_for_an_attempt_that_has_a_successor(run: RunDirectory) -> None:
    run.attempt(1).make()
    assert judge(run, 0)["error"].startswith("rank 3 on node1")
    assert not run.result.exists()


def test_slurms_word_on_the_end_replaces_a_record_without_it(run: RunDirectory) -> None:
    """The batch script has asked before Slurm knew by whom it was cancelled."""
    begin(run, 0, "scancel")
    assert judge(run, status=143, state=JobState("COMPLETING"))["slurm_state"] is None
    assert "was cancelled by root; " in judge(run, state=JobState("CANCELLED", by="0"))["error"] + "; "
    assert read_json(run.result)["slurm_state"] == "CANCELLED"


def test_a_record_that_names_a_rank_is_not_replaced_by_one_that_names_none(run: RunDirectory) -> None:
    judge(run)
    run.attempt(0).srun_log.unlink()
    assert judge(run, state=JobState("CANCELLED"))["error"].startswith("rank 3")


def test_a_later_attempt_puts_aside_what_an_earlier_one_left(run: RunDirectory) -> None:
    judge(run)
    run.begin(0)
    assert run.result.exists()
    run.attempt(1).make()
    run.begin(2)  # that of an attempt whose rank 0 did not get so far
    run.begin(2)
    assert not run.result.exists()
    assert not (run.attempt(1).path / "result.json").exists()
    assert read_json(run.attempt(0).path / "result.json")["failure"]["rank"] == 3
    # What the attempt itself has written by then stays where it is.
    write_json(run.result, {"status": "done", "attempt": 2})
    (run.attempt(0).path / "result.json").unlink()
    run.begin(2)
    assert read_json(run.result) == {"status": "done", "attempt": 2}


# --- in the batch script ----------------------------------------------------------------------------------------------


def ended(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys\nfor name in ('torch', 'numpy'): sys.modules[name] = None\nimport runpy\n"
    code += f"sys.argv[1:] = {['--ended', *words]!r}\nrunpy.run_path({str(processes.ENTRY)!r}, run_name='__main__')\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_batch_script_leaves_the_record_and_one_line(run: RunDirectory) -> None:
    done = ended(str(run.path), "0", "137")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("meshrun: attempt 0 failed: rank 3 on node1: killed by SIGKILL")
    assert done.stderr.count("\n") == 1
    assert read_json(run.result)["failure"]["rank"] == 3


@pytest.mark.parametrize("words", [["/gone", "0", "1"], ["{run}", "x", "1"], ["{run}"], []], ids=str)
def test_whatever_happens_the_script_goes_on(words: list[str], run: RunDirectory) -> None:
    done = ended(*(word.format(run=run.path) for word in words))
    assert done.returncode == 0
    assert done.stderr.startswith("meshrun: ")
    assert done.stderr.count("\n") == 1


def test_a_run_directory_that_cannot_be_written_to_is_no_reason_to_say_nothing(run: RunDirectory) -> None:
    run.result.mkdir()
    assert "rank 3 on node1: killed by SIGKILL" in ended(str(run.path), "0", "137").stderr


SHOWN = "JobId=12 JobState=RUNNING Restarts=0 PreemptTime={} NodeList=node[0-1]"


@pytest.mark.parametrize(
    ("log", "failures", "preempted", "waits"),
    [
        ("preemption-with-grace", [], "2026-11-22T11:29:00", True),
        ("preemption-with-grace", [lost(0)], "2026-11-22T11:29:00", True),
        ("", [], "2026-11-22T11:29:00", True),  # the site's set-up was ended
        ("preemption-with-grace", [], "None", False),
        ("preemption-with-grace", [error(0)], "2026-11-22T11:29:00", False),
        ("SIGKILL", [], "2026-11-22T11:29:00", False),
        ("scancel", [], "2026-11-22T11:29:00", True),  # srun is not told why
        ("scancel", [], "None", False),
        ("srun-terminated", [], "2026-11-22T11:29:00", True),
        ("node-failure", [], "2026-11-22T11:29:00", False),
    ],
)
def test_a_preempted_job_waits_for_slurm_to_end_it(
    log: str,
    failures: list[Failure],
    preempted: str,
    waits: bool,
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{SHOWN.format(preempted)}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    begin(run, 0, log or "SIGKILL")
    if not log:
        run.attempt(0).srun_log.unlink()
    for failure in failures:
        write_json(run.attempt(0).failure(failure.rank), failure.to_json())
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert not run.result.exists()  # it is no failure while it may come back

    line = outcome.ended(str(run.path), "0", "143", sleep=sleep)
    assert slept == ([3600.0] if waits else [])
    assert ("preempted; waiting for Slurm" in capsys.readouterr().err) == waits
    assert not waits or line == "meshrun: attempt 0 failed: job 12 was preempted by Slurm"
    assert read_json(run.result)["status"] == "failed"
