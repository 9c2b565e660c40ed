"""srun's words as they were recorded: who ended, in which order, and whether something ended all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.slurm import srun
from jobs.slurm.srun import SrunWords

RECORDED = Path(__file__).with_name("recorded") / "srun"
"""Each of a job of ranks 0 and 1 on node0, 2 and 3 on node1, unless it says otherwise; Slurm 22.05."""


def recorded(name: str) -> SrunWords:
    return srun.read((RECORDED / f"{name}.log").read_text())


@pytest.mark.parametrize(
    ("name", "own", "cause"),
    [
        ("raise", {3: 1}, ""),
        ("sys-exit", {3: 3}, ""),
        ("os-exit-0", {0: 1}, ""),  # of two ranks on two hosts: rank 1 left with 0, of which srun does not speak
        ("SIGKILL", {3: -9}, ""),
        ("SIGKILL-of-two", {3: -9}, ""),
        ("SIGSEGV", {3: -11}, ""),
        ("SIGABRT", {3: -6}, ""),
        ("SIGTERM", {3: -15}, ""),
        ("no-such-python", {2: 2, 3: 2}, ""),
        ("unknown-option", {}, ""),
        ("too-many-nodes", {}, ""),
        ("scancel", {}, "CANCELLED"),
        ("batch-script-killed", {}, "STEP_ENDED"),
        ("step-cancelled", {}, "STEP_ENDED"),
        ("srun-terminated", {}, "STEP_ENDED"),
        ("time-limit", {}, "CANCELLED"),  # srun is not told why
        ("preemption", {}, "CANCELLED"),
        ("preemption-with-grace", {0: -15, 1: -15}, ""),
        ("node-failure", {}, "NODE_FAIL"),
        ("node-failure-after-an-echo", {0: 1}, ""),  # two ranks; rank 0 lost rank 1 before Slurm missed its host
    ],
)
def test_what_srun_said(name: str, own: dict[int, int], cause: str) -> None:
    words = recorded(name)
    assert {end.rank: end.code for end in words.ends if not end.echo} == own
    assert words.cause == cause
    assert words.lost_hosts == (("node1",) if name.startswith("node-failure") else ())
    assert words.later == ("NODE_FAIL" if name == "node-failure-after-an-echo" else "")


def test_the_hosts_of_ranks() -> None:
    assert {end.rank: end.host for end in recorded("raise").ends} == {3: "node1", 2: "node1", 0: "node0", 1: "node0"}
    many = srun.read("srun: error: n[1-2]: tasks 0-1,6-7: Killed (core dumped)\n")
    assert {end.rank: end.host for end in many.ends} == {0: "n1", 1: "n1", 6: "n2", 7: "n2"}


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
    # After a rank's own end it is only how the others were ended.
    after = srun.read(own + "srun: Terminating StepId=12.0\n" + line)
    assert (after.cause, [end.rank for end in after.ends]) == ("", [3])


@pytest.mark.parametrize("text", ["", "\n\n", "srun: error: node1: task x: y\n", "srun: error: : tasks -: Killed\n"])
def test_words_that_cannot_be_read_are_nobodys_end(text: str) -> None:
    assert srun.read(text).ends == ()
