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
from jobs.blame import Failure, LastSeen
from jobs.run_dir import RunDirectory, Submitted, read_json, write_json
from jobs.runs import outcome
from jobs.runs.outcome import Evidence, conclude, gather
from jobs.slurm import srun
from jobs.slurm.query import JobState
from jobs.slurm.srun import SrunLog
from jobs.status import status
from tests.jobs.slurm.test_srun import RECORDED, recorded

NOW = 1000.0
UNREACHABLE = Failure(3, "node1", 0.0, "unreachable", "rank 0 announced itself, and it cannot be reached from here")


def seen(name: str = "", failures: list[Failure] | None = None, state: str = "", **more: Any) -> Evidence:
    return Evidence(
        workload="mine",
        attempt=0,
        job_id="12",
        gpus_per_node=2,
        now=NOW,
        failures=failures or [],
        srun=recorded(name) if name else SrunLog(),
        state=JobState(state) if state else None,
        logs={number: f"/run/agent-{number}.log" for number in range(2)},
        srun_log="/run/srun.log",
        slurm_log="/run/slurm.log",
        **{"status": 143, **more},
    )


def error(rank: int, when: float = 500.0, message: str = "ValueError: mine") -> Failure:
    return Failure(rank, f"node{rank // 2}", when, "error", message, f"Traceback of {rank}", f"/run/rank-{rank}.log")


def lost(rank: int, when: float = 400.0) -> Failure:
    return Failure(rank, f"node{rank // 2}", when, "lost_peer", "RuntimeError: Connection closed by peer", "T", "")


def terminated(rank: int) -> Failure:
    """What an agent leaves of a rank that got the job's SIGTERM, too."""
    return replace(error(rank), kind="killed", message="killed by SIGTERM (someone's kill, or the scheduler's)")


MISSING = "slurmstepd-node0: error: execve(): /no/such/python: No such file or directory"
TWO_ENDS = srun.read(
    "srun: error: node0: task 0: Exited with exit code 1\nsrun: error: node1: task 1: Exited with exit code 2\n"
)
"""Every agent exits with 1 when the job has failed; put together, as srun mostly ends the others first."""
FULL = "/run cannot be written to: No space left on device"


# --- whom to name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        # An agent or the leader was killed, or could not start.
        (
            seen("agent-killed", status=137),
            "the agent on node1: killed by SIGKILL (out of memory, or someone's kill -9) (log: /run/agent-1.log)",
        ),
        (seen("leader-killed", status=137), "the leader on node0: killed by SIGKILL (out of memory, or someone's"),
        (seen("leader-killed", [lost(2), lost(3)]), "the leader on node0: killed by SIGKILL"),
        (
            seen("no-such-python", last_lines={0: MISSING}, status=2),
            f"the leader on node0: exited with code 2: {MISSING} (log: /run/agent-0.log)",
        ),
        (seen("no-such-python", status=2), "the leader on node0: exited with code 2 (log: /run/agent-0.log)"),
        (
            seen("job-failed", last_lines={1: "ImportError: no jobs"}, status=1),
            "the agent on node1: exited with code 1: ImportError: no jobs (log: /run/agent-1.log)",
        ),
        (replace(seen(status=2), srun=TWO_ENDS), "the agent on node1: exited with code 2 (log: /run/agent-1.log)"),
        # An agent's death comes before the error that somebody makes of it.
        (seen("leader-killed", [error(3, message="ValueError: no answer")]), "the leader on node0: killed by SIGKILL"),
        # The leader has found the root cause, and could not write it down.
        (
            seen("job-failed", [error(2)], leader_error="rank 3 on node1: ValueError: first (log: /run/rank-3.log)"),
            "rank 3 on node1: ValueError: first (log: /run/rank-3.log)",
        ),
        (
            seen("job-failed", fault=FULL, status=1),
            f"job 12 ended, and no agent could record why: {FULL} (log: /run/sru",
        ),
        (seen("no-such-python", fault=FULL, status=2), "the leader on node0: exited with code 2"),
        # It has not, but agents have left what their ranks met with.
        (seen("job-failed", [lost(1), error(3), lost(0)]), "rank 3 on node1: ValueError: mine (log: /run/rank-3.log)"),
        (
            seen(failures=[lost(0), replace(UNREACHABLE, when=500.0)]),
            "rank 3 on node1: rank 0 announced itself, and it",
        ),
        (seen(failures=[lost(3), lost(0, 300.0)]), "rank 0 on node0: RuntimeError: Connection closed by peer"),
        # What Slurm did.
        (seen("time-limit", state="TIMEOUT", time_min=90), "job 12 reached its time limit of 90 min; ask for more"),
        (seen("scancel", state="CANCELLED"), "job 12 was cancelled"),
        (seen("scancel"), "job 12 was cancelled"),
        (replace(seen(), logs={}, state=JobState("CANCELLED", by="0")), "job 12 was cancelled by root before it star"),
        (
            seen("scancel", [lost(1)], last_progress="its ranks had finished step 9"),
            "job 12 was cancelled; its ranks had finished step 9",
        ),
        (
            seen("batch-script-killed", state="FAILED", status=None, last_progress="its ranks had finished step 9"),
            "the batch script of job 12 was killed (someone's kill, or its host ran out of memory); its ranks had",
        ),
        (
            seen("step-cancelled", status=137),
            "the srun of job 12 was terminated (someone's kill, or a scancel of the s",
        ),
        (seen("step-cancelled", state="CANCELLED"), "job 12 was cancelled"),
        (seen("preemption", state="PREEMPTED"), "job 12 was preempted by Slurm"),
        (seen("node-failure", [lost(0)]), "node1 failed, which ended job 12"),
        (seen(state="NODE_FAIL"), "a host of job 12 failed"),
        (seen(state="NODE_FAIL", down_hosts=("node0",)), "node0 failed, which ended job 12"),
        (seen("node-failure", state="NODE_FAIL", down_hosts=("node0",)), "node1 failed, which ended job 12"),
        (seen(state="BOOT_FAIL"), "a host of job 12 did not start"),
        (seen(state="DEADLINE"), "job 12 could not finish before its deadline"),
        (seen(state="OUT_OF_MEMORY"), "job 12 used more memory than it requested"),
        (
            seen("SIGTERM", [terminated(rank) for rank in range(4)]),
            "job 12 received SIGTERM on node1 (preemption, or someone's kill)",
        ),
        (replace(seen("SIGTERM"), state=JobState("RUNNING", preempted=True)), "job 12 was preempted by Slurm"),
        # What a rank meets with while Slurm ends it is not what ended the job.
        (seen("scancel", [error(0, message="a worker was killed"), terminated(2)]), "job 12 was cancelled"),
        (seen("SIGTERM", [error(0, message="a worker was killed")]), "job 12 received SIGTERM on node1"),
        (seen(state="TIMEOUT", failures=[terminated(0)]), "job 12 reached its time limit"),
        # A rank's own failure stands, whatever was done to the job afterwards.
        (seen("job-failed", [error(3)], state="CANCELLED"), "rank 3 on node1: ValueError: mine"),
        (seen(failures=[error(3)], state="NODE_FAIL"), "rank 3 on node1: ValueError: mine"),
        # srun itself.
        (
            seen("unknown-option", status=255),
            "job 12: srun ended with code 255: srun: unrecognized option '--bad-arg' (log: /run/srun.log)",
        ),
        (seen("too-many-nodes", status=1), "with code 1: srun: error: Only allocated 2 nodes asked for 4"),
        (
            seen(status=137),
            "job 12: srun ended with code 137 (SIGKILL), and no agent left a reason (log: /run/srun.log)",
        ),
        (seen(status=7), "job 12: srun ended with code 7, and no agent left a reason (log: /run/srun.log)"),
        (
            replace(seen(state="FAILED", status=None), logs={}, last_script_line="module: command not found"),
            "job 12 ended (FAILED) before any rank was started; its last output: module: command not found (log: ",
        ),
        (
            replace(seen(status=127), logs={}, last_script_line="module: command not found"),
            "job 12 ended before any rank was started; its last output: module: command not found (log: ",
        ),
        (
            replace(seen(status=127), logs={}, srun_began=True),
            "srun ended with code 127, and no agent left a reason",
        ),
        (
            replace(seen(state="FAILED", status=None), logs={}, last_script_line="/bin/false"),
            "job 12 ended (FAILED) before any rank was started; its last output: /bin/false (log: ",
        ),
        (
            replace(seen(state="FAILED", status=None), logs={}, slurm_log_exists=False),
            "job 12 ended (FAILED), and its first host could not write /run/slurm.log; make sure that the run",
        ),
        # Nothing failed, and there is no result.
        (
            replace(seen(status=0), logs={}, last_script_line="the licence is out"),
            "job 12 ended before any rank was started; its last output: the licence is out (log: /run/slurm.log)",
        ),
        (seen(status=0), "job 12: every rank finished its work, but none left a result (log: /run/agent-0.log)"),
        (seen(state="COMPLETED", status=None), "job 12: every rank finished its work, but none left a result"),
        (seen(state="FAILED", status=None), "job 12 ended (FAILED), and no agent left a result or a reason"),
        (seen(status=7, fault=FULL), f"job 12 ended, and no agent could record why: {FULL} (log:"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_whom_or_what_the_record_names(evidence: Evidence, says: str) -> None:
    record = outcome.outcome(evidence)
    assert says in record["error"]
    assert record["status"] == "failed"
    failure = record["failure"]
    if failure:
        assert record["error"] == Failure(**failure).headline()
        assert record["traceback"] == failure["traceback"]
    json.dumps(record, allow_nan=False)


def test_the_record_names_a_rank_or_an_agent_where_one_failed() -> None:
    """Then what Slurm says of the job later does not replace it."""
    failure = outcome.outcome(seen("agent-killed"))["failure"]
    assert (failure["rank"], failure["host"], failure["kind"]) == (2, "node1", "agent")
    assert failure["log"] == "/run/agent-1.log"
    for evidence in (seen("scancel"), seen("SIGTERM"), seen("job-failed")):
        assert outcome.outcome(evidence)["failure"] is None


def test_out_of_memory() -> None:
    log = srun.read("srun: error: node1: task 1: Out Of Memory\nsrun: Terminating StepId=12.0\n")
    record = outcome.outcome(replace(seen(), srun=log))
    assert record["error"].startswith("the agent on node1: killed by SIGKILL: its host's memory")
    killed = outcome.outcome(seen("agent-killed", state="OUT_OF_MEMORY"))
    assert killed["error"].startswith("the agent on node1: killed by SIGKILL: its host's memory")


def test_the_record_has_what_a_local_jobs_has() -> None:
    record = outcome.outcome(seen("job-failed", [error(3)]))
    assert {"status", "workload", "attempt", "error", "traceback", "failure"} <= set(record)
    assert record["traceback"] == "Traceback of 3"


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The run directory of a job of 2 x 2 whose second agent was killed."""
    run = RunDirectory.create(tmp_path / "run")
    write_json(run.job, {"workload": "mine", "resources": {"nodes": 2, "gpus_per_node": 2, "time_min": 5}})
    run.record_submission(Submitted("slurm", "12", "2026-11-22T08:15:30Z", "login"))
    begin(run, 0, "agent-killed")
    return run


def begin(run: RunDirectory, attempt: int, name: str) -> None:
    there = run.attempt(attempt).make()
    there.srun_log.write_text((RECORDED / f"{name}.log").read_text())
    for number in range(2):
        there.agent_log(number).write_text("12:00:00 [agent] INFO: ranks started: 2, after 2.01 s\n")


def judge(run: RunDirectory, attempt: int = 0, **more: Any) -> dict[str, Any]:
    return conclude(run, gather(run, attempt, **more))


def test_everything_is_read_and_the_record_is_left(run: RunDirectory) -> None:
    write_json(run.attempt(0).failure(0), lost(0).to_json())
    record = judge(run, status=137)
    assert record["error"].startswith("the agent on node1: killed by SIGKILL")
    assert record["error"].endswith(f"(log: {run.attempt(0).agent_log(1)})")
    assert record["failure"]["rank"] == 2
    assert (record["job_id"], record["workload"], record["attempt"]) == ("12", "mine", 0)
    assert read_json(run.attempt(0).result) == record


def test_what_agents_have_left_of_their_ranks_is_read(run: RunDirectory) -> None:
    run.attempt(0).srun_log.write_text("")
    for failure in (lost(0), error(2), lost(3)):
        write_json(run.attempt(0).failure(failure.rank), failure.to_json())
    assert judge(run, status=1)["error"] == "rank 2 on node1: ValueError: mine (log: /run/rank-2.log)"


def test_the_logs_of_agents_are_read(run: RunDirectory) -> None:
    begin(run, 0, "no-such-python")
    run.attempt(0).agent_log(0).write_text(MISSING + "\n")
    error = judge(run, status=2)["error"]
    assert error == f"the leader on node0: exited with code 2: {MISSING} (log: {run.attempt(0).agent_log(0)})"


def test_what_the_leader_could_write_into_its_log_alone_is_the_root_cause(run: RunDirectory) -> None:
    begin(run, 0, "job-failed")
    headline = "rank 3 on node1: ValueError: mine (log: /run/rank-3.log)"
    with run.attempt(0).agent_log(0).open("a") as log:
        log.write(f"jobs.errors.JobFailed: {headline}\nslurmstepd: error: something after it\n")
    assert judge(run, status=1)["error"] == headline


def test_hundreds_of_hosts_are_not_hundreds_of_questions(run: RunDirectory) -> None:
    """Of a file system that many hosts share, and that the ranks' own ends keep busy."""
    there, hosts = run.attempt(0), 512
    write_json(run.job, {"workload": "mine", "resources": {"nodes": hosts, "gpus_per_node": 8}})
    for number in range(hosts):
        there.agent_log(number).touch()
    killed = "".join(f"srun: error: node{number}: task {number}: Killed\n" for number in range(hosts))
    there.srun_log.write_text(killed)
    for rank in (3, 1001):
        write_json(there.failure(rank), lost(rank).to_json())
    code = "import pathlib, sys\nfrom jobs.runs import outcome\nfrom jobs.run_dir import RunDirectory\n"
    code += "asked = []\nwatched = ('open', 'os.listdir', 'os.scandir')\n"
    code += "is_path = lambda event, args: event in watched and type(args[0]) is not int\n"
    code += "sys.addaudithook(lambda event, args: asked.append(event) if is_path(event, args) else None)\n"
    code += "stat = pathlib.Path.stat\n"
    code += "pathlib.Path.stat = lambda path, **more: asked.append('stat') or stat(path, **more)\n"
    code += f"seen = outcome.gather(RunDirectory(pathlib.Path({str(run.path)!r})), 0, status=1)\n"
    code += "print(len(asked), len(seen.logs), len(seen.srun.ends), *[f.rank for f in seen.failures])\n"
    root = Path(outcome.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    asked, *found = map(int, done.stdout.split())
    assert found == [512, 512, 3, 1001]
    assert asked < 50


def test_a_damaged_record_is_none(run: RunDirectory) -> None:
    run.attempt(0).failure(0).write_text('{"rank": 0}')
    run.attempt(0).failure(1).write_text("")
    assert judge(run)["error"].startswith("the agent on node1: killed by SIGKILL")


def test_why_slurm_ended_it_is_in_the_batch_scripts_own_log(run: RunDirectory) -> None:
    begin(run, 0, "time-limit")
    line = "slurmstepd-node0: error: *** JOB 12 ON node0 CANCELLED AT 2026-11-22T11:32:56"
    run.slurm_log.write_text(f"{line} DUE TO PREEMPTION ***\n{line} DUE TO TIME LIMIT ***\n")
    assert judge(run)["error"] == "job 12 reached its time limit of 5 min; ask for more with --time"


def test_where_the_ranks_were_is_in_the_leaders_status(run: RunDirectory) -> None:
    begin(run, 0, "scancel")
    ranks = [LastSeen(0, "node0", "9", 0.5, "data"), LastSeen(1, "node1", "8", 40.2, "forward")]
    write_json(run.attempt(0).status, status(ranks, 1e9))
    where = "its ranks had finished step 9, but rank 1 on node1 only step 8 (in forward for 40 s)"
    assert judge(run)["error"] == f"job 12 was cancelled; {where}"


def test_a_result_that_is_done_stays(run: RunDirectory) -> None:
    write_json(run.attempt(0).result, {"status": "done", "attempt": 0})
    assert judge(run)["status"] == "done"
    assert read_json(run.attempt(0).result) == {"status": "done", "attempt": 0}


def test_what_is_found_of_an_earlier_attempt_stays_with_it(run: RunDirectory) -> None:
    begin(run, 1, "leader-killed")
    later = {"status": "failed", "attempt": 1, "error": "later"}
    run.publish(dict(later))
    assert judge(run, 0)["error"].startswith("the agent on node1")
    assert run.recorded() == read_json(run.result) == later


def test_slurms_word_on_the_end_replaces_a_record_without_it(run: RunDirectory) -> None:
    """The batch script has asked before Slurm knew by whom it was cancelled."""
    begin(run, 0, "scancel")
    assert judge(run, status=143, state=JobState("COMPLETING"))["slurm_state"] is None
    assert "was cancelled by root; " in judge(run, state=JobState("CANCELLED", by="0"))["error"] + "; "
    assert read_json(run.attempt(0).result)["slurm_state"] == "CANCELLED"


def test_a_record_that_names_a_rank_is_not_replaced_by_one_that_names_none(run: RunDirectory) -> None:
    judge(run)
    run.attempt(0).srun_log.unlink()
    assert judge(run, state=JobState("CANCELLED"))["error"].startswith("the agent on node1")


# --- in the batch script ----------------------------------------------------------------------------------------------


def ended(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys\nfor name in ('torch', 'numpy'): sys.modules[name] = None\nimport runpy\n"
    code += f"sys.argv[1:] = {['--ended', *words]!r}\nrunpy.run_path({str(processes.ENTRY)!r}, run_name='__main__')\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_batch_script_leaves_the_record_and_one_line(run: RunDirectory) -> None:
    done = ended(str(run.path), "0", "137")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("meshrun: attempt 0 failed: the agent on node1: killed by SIGKILL")
    assert done.stderr.count("\n") == 1
    assert read_json(run.attempt(0).result)["failure"]["rank"] == 2


def test_what_the_leader_has_left_is_said_and_stays(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though srun's log names an agent, which was ended after it, and nobody need ask Slurm."""
    monkeypatch.setattr(outcome, "gather", None)
    record = {"status": "failed", "attempt": 0, "error": "rank 3 on node1: mine", "failure": error(3).to_json()}
    write_json(run.attempt(0).result, record)
    assert outcome.ended(str(run.path), "0", "1") == "meshrun: attempt 0 failed: rank 3 on node1: mine"
    assert read_json(run.attempt(0).result) == record
    write_json(run.attempt(0).result, {"status": "done", "attempt": 0})
    line = "meshrun: attempt 0: the work is done, but then srun ended with code 7"
    assert outcome.ended(str(run.path), "0", "7") == line
    # That of an earlier attempt is not this one's.
    begin(run, 1, "leader-killed")
    assert ended(str(run.path), "1", "137").stderr.startswith("meshrun: attempt 1 failed: the leader on node0: killed")


@pytest.mark.parametrize("words", [["/gone", "0", "1"], ["{run}", "x", "1"], ["{run}"], []], ids=str)
def test_whatever_happens_the_script_goes_on(words: list[str], run: RunDirectory) -> None:
    done = ended(*(word.format(run=run.path) for word in words))
    assert done.returncode == 0
    assert done.stderr.startswith("meshrun: ")
    assert done.stderr.count("\n") == 1


def test_a_run_directory_that_cannot_be_written_to_is_no_reason_to_say_nothing(run: RunDirectory) -> None:
    run.attempt(0).result.mkdir()
    assert "the agent on node1: killed by SIGKILL" in ended(str(run.path), "0", "137").stderr


SHOWN = "JobId=12 JobState=RUNNING Restarts=0 PreemptTime={} NodeList=node[0-1]"


@pytest.mark.parametrize(
    ("log", "failures", "preempted", "waits"),
    [
        ("SIGTERM", [], "2026-11-22T11:29:00", True),
        ("SIGTERM", [lost(0), terminated(2)], "2026-11-22T11:29:00", True),
        ("", [], "2026-11-22T11:29:00", True),  # the site's set-up was ended
        ("SIGTERM", [], "None", False),
        ("job-failed", [error(0)], "2026-11-22T11:29:00", False),
        ("agent-killed", [], "2026-11-22T11:29:00", False),
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
    begin(run, 0, log or "agent-killed")
    if not log:
        run.attempt(0).srun_log.unlink()
    for failure in failures:
        write_json(run.attempt(0).failure(failure.rank), failure.to_json())
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert not run.attempt(0).result.exists()  # it is no failure while it may come back

    line = outcome.ended(str(run.path), "0", "143", sleep=sleep)
    assert slept == ([3600.0] if waits else [])
    assert ("preempted; waiting for Slurm" in capsys.readouterr().err) == waits
    assert not waits or line == "meshrun: attempt 0 failed: job 12 was preempted by Slurm"
    assert read_json(run.attempt(0).result)["status"] == "failed"


STOPPED = {"status": "stopped", "attempt": 0, "error": "by request, after step 5 of 9"}


@pytest.mark.parametrize(
    ("by", "log", "preempted", "more", "status", "error", "decision"),
    [
        ("SIGUSR2", "", "None", [], "stopped", "before its time limit, after step 5 of 9", "requeued (requeue 1 of 1)"),
        ("SIGUSR2", "", "2026-11-22T11:29:00", [], "stopped", "by a preemption, after step 5 of 9", "Slurm starts it"),
        ("SIGUSR2", "", "None", ["refuse"], "stopped", "before its time limit", "not requeued: Requested operation is"),
        ("SIGUSR2", "", "None", ["nothing"], "stopped", "before its time limit", "not requeued: nothing was saved in "),
        ("SIGUSR2", "", "None", ["earlier"], "stopped", "before its time limit", "not requeued: all requeues are used"),
        ("SIGTERM", "", "2026-11-22T11:29:00", [], "stopped", "by a preemption", "Slurm starts it again"),
        (
            "SIGUSR2",
            "scancel",
            "None",
            ["no grace"],
            "stopped",
            "by a preemption, after step 5 of 9",
            "Slurm starts it",
        ),
        ("SIGTERM", "scancel", "None", [], "cancelled", "job 12 was cancelled, after step 5 of 9", "cancelled"),
        ("SIGTERM", "time-limit", "None", [], "stopped", "before its time limit", "requeued (requeue 1 of 1)"),
        (
            "SIGTERM",
            "",
            "None",
            [],
            "stopped",
            "by request, after step 5 of 9",
            "not requeued: someone's SIGTERM",
        ),
    ],
)
def test_what_becomes_of_a_run_that_was_stopped(
    by: str,
    log: str,
    preempted: str,
    more: list[str],
    status: str,
    error: str,
    decision: str,
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuses = "echo 'Requested operation is presently disabled' >&2; exit 1"
    requeue = refuses if "refuse" in more else f"touch {tmp_path}/back"
    show = f"echo '{SHOWN.format(preempted)}'"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ "$1 $2" = "requeue 12" ] || {{ {show}; exit; }}\n{requeue}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    begin(run, 0, log or "job-failed")
    run.attempt(0).srun_log.write_text(run.attempt(0).srun_log.read_text() if log else "")
    due_to = "TIME LIMIT" if log == "time-limit" else "PREEMPTION" if "no grace" in more else ""
    if due_to:
        line = f"slurmstepd-node0: error: *** JOB 12 ON node0 CANCELLED AT 2026-11-22T11:32:56 DUE TO {due_to} ***"
        run.slurm_log.write_text(line + "\n")
    write_json(run.job, {**(read_json(run.job) or {}), "max_requeues": 1})
    number = 0
    if "earlier" in more:
        write_json(run.attempt(0).result, {**STOPPED, "stopped_by": "time limit", "next_attempt": 1})
        number = run.begin_attempt().number
    if "nothing" not in more:
        (run.checkpoints / "step_5").mkdir(parents=True)
    write_json(run.attempt(number).result, {**STOPPED, "attempt": number, "stopped_by": by})
    slept: list[float] = []
    line = outcome.ended(str(run.path), str(number), "0", sleep=slept.append)
    record = read_json(run.attempt(number).result) or {}
    assert record["status"] == status
    assert record["error"].startswith(error)
    assert record["decision"].startswith(decision)
    goes_on = not decision.startswith(("not", "cancelled"))
    assert (record.get("next_attempt") == number + 1) == goes_on == (slept == [3600.0])
    assert (tmp_path / "back").exists() == decision.startswith("requeued")
    assert goes_on or line == f"meshrun: attempt {number} was stopped: {record['error']}; {record['decision']}"


def test_a_run_that_its_user_has_stopped_stays_so(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "gather", None)
    record = {**STOPPED, "stopped_by": "SIGUSR1"}
    write_json(run.attempt(0).result, record)
    assert outcome.ended(str(run.path), "0", "0") == "meshrun: attempt 0 was stopped: by request, after step 5 of 9"
    assert read_json(run.attempt(0).result) == record
