"""srun's log as it was recorded: which agents ended, in which order, and whether something ended all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.slurm import srun
from jobs.slurm.srun import SrunLog

RECORDED = Path(__file__).with_name("recorded") / "srun"
"""Each of a job with agent 0 on node0 and agent 1 on node1; Slurm 22.05."""


def recorded(name: str) -> SrunLog:
    return srun.read((RECORDED / f"{name}.log").read_text())


@pytest.mark.parametrize(
    ("name", "first", "cause"),
    [
        ("job-failed", {1: 1}, ""),
        ("agent-killed", {1: -9}, ""),
        ("leader-killed", {0: -9}, ""),
        ("SIGTERM", {1: -15}, ""),  # to all of them: srun ends the others as soon as it knows of one
        ("no-such-python", {0: 2}, ""),
        ("unknown-option", {}, ""),
        ("too-many-nodes", {}, ""),
        ("scancel", {}, "CANCELLED"),
        ("batch-script-killed", {}, "STEP_ENDED"),
        ("step-cancelled", {}, "STEP_ENDED"),
        ("srun-terminated", {}, "STEP_ENDED"),
        ("time-limit", {}, "CANCELLED"),  # srun is not told why
        ("preemption", {}, "CANCELLED"),
        ("node-failure", {}, "NODE_FAIL"),
    ],
)
def test_what_srun_said(name: str, first: dict[int, int], cause: str) -> None:
    log = recorded(name)
    assert {end.number: end.code for end in log.first_ends} == first
    assert all(end.host == f"node{end.number}" for end in log.ends)
    assert log.cause == cause
    assert log.lost_hosts == (("node1",) if name == "node-failure" else ())


def test_a_lost_host_is_the_cause_unless_an_agent_had_ended() -> None:
    aborted, lost_host = "srun: Job step aborted: Waiting\n", "srun: error: Node failure on n[1-2]\n"
    own = "srun: error: n0: task 0: Exited with exit code 1\nsrun: Terminating StepId=12.0\n"
    for text, cause in ((aborted + lost_host, "NODE_FAIL"), (own + lost_host, "")):
        log = srun.read(text)
        assert (log.cause, log.lost_hosts) == (cause, ("n1", "n2"))


@pytest.mark.parametrize("name", ["scancel", "step-cancelled"])
def test_the_batch_scripts_log_knows_why_slurm_ended_the_job(name: str) -> None:
    script_log = "slurmstepd-node0: error: *** JOB 12 ON node0 CANCELLED AT 2026-11-22T11:32:56 DUE TO TIME LIMIT ***\n"
    assert srun.with_the_reason(recorded(name), script_log).cause == "TIMEOUT"
    assert srun.with_the_reason(recorded(name), "").cause == recorded(name).cause
    assert srun.with_the_reason(recorded("agent-killed"), script_log).cause == ""


def test_one_line_on_several_hosts() -> None:
    many = srun.read("srun: error: n[1-2]: tasks 0-1: Killed (core dumped)\n")
    assert {end.number: end.host for end in many.ends} == {0: "n1", 1: "n2"}
    assert many.end_on("n2") == many.ends[1]
    assert many.end_on("n3") is None


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-22T11:32:56 DUE TO TIME LIMIT ***", "TIMEOUT"),
        ("slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22T11:32:56 DUE TO PREEMPTION ***", "PREEMPTED"),
        (
            "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22T11:32:56 DUE TO NODE FAILURE, SEE "
            "SLURMCTLD LOG FOR DETAILS ***",
            "NODE_FAIL",
        ),
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-22T11:32:56 ***", "CANCELLED"),
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-22T11:32:56 DUE TO TASK FAILURE ***", ""),
    ],
)
def test_what_slurmstepd_says_of_the_cause(line: str, cause: str) -> None:
    own = "srun: error: n1: task 3: Exited with exit code 1\n"
    assert srun.read(line + "\n").cause == cause
    assert srun.read("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n" + line).cause in (
        {cause} if cause else {"STEP_ENDED"}
    )
    # After an agent's own end it is only how the others were ended.
    after = srun.read(own + "srun: Terminating StepId=12.0\n" + line)
    assert (after.cause, [end.number for end in after.ends]) == ("", [3])


@pytest.mark.parametrize("text", ["", "\n\n", "srun: error: node1: task x: y\n", "srun: error: : tasks -: Killed\n"])
def test_words_that_cannot_be_read_are_nobodys_end(text: str) -> None:
    assert srun.read(text).ends == ()
