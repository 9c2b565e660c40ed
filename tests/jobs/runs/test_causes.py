"""What is known of a run -> why it failed, hangs or waits: the kind, and the words."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import blame
from jobs.agent import hang_cause
from jobs.agent.hang_cause import Shown
from jobs.blame import Failure, LastSeen
from jobs.runs.cause import KINDS, Cause, Facts, Mark, duration, size
from jobs.runs.causes import cause_of
from jobs.slurm.query import JobState, limit_in_words, meaning
from workloads.errors import WorkloadError

RECORDED = json.loads((Path(__file__).parent / "recorded" / "causes.json").read_text())
"""The facts of failures that really happened, as `python -m tests.benchmarks.explain --record FILE` leaves them."""
LOG = "/run/attempt-0/rank-3.log"


def restored(known: dict[str, Any]) -> Facts:
    """Facts from their JSON."""
    failure, state = known.get("failure"), known.get("state")
    return Facts(
        **{
            **known,
            "failure": Failure(**failure) if failure else None,
            "failures": tuple(Failure(**one) for one in known.get("failures", ())),
            "state": JobState(**state) if state else None,
            "marks": {name: Mark(*mark) for name, mark in known.get("marks", {}).items()},
        }
    )


def of_failure(failure: Failure, **known: Any) -> Cause:
    record = {"status": "failed", **known.pop("record", {})}
    return cause_of(Facts("ended", ranks=4, hosts=2, record=record, failure=failure, **known))


def of_error(error: BaseException, **known: Any) -> Cause:
    return of_failure(blame.failure_of(error, 3, "node1", 1.0, LOG), **known)


def of_text(error: str, **known: Any) -> Cause:
    record = {"status": "failed", "error": error}
    return cause_of(Facts("ended", executor="slurm", job_id="7", record=record, **known))


def text_of(cause: Cause) -> str:
    return " ".join(cause.sentences)


# --- failures that have really happened -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['how']}: {case['name']}")
def test_a_failure_that_has_happened_is_explained(case: dict[str, Any]) -> None:
    cause = cause_of(restored(case["facts"]))
    assert cause.kind in KINDS
    assert cause.kind == case["kind"]
    text = text_of(cause)
    assert ".. " not in text
    assert "  " not in text
    for sentence in cause.sentences:
        assert not sentence[0].islower()
        assert sentence[-1] in ".?"


def test_the_recorded_failures_are_of_many_kinds() -> None:
    causes = [cause_of(restored(case["facts"])) for case in RECORDED]
    kinds = {cause.reason or cause.kind for cause in causes}
    assert len(kinds) >= 25


# --- what failed, in the words of those who found it ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("CUDA out of memory, no space left on device, nan"), "exception"),
        (ConnectionRefusedError("my server refused"), "exception"),
        (RuntimeError("the tokenizer is out of memory slots"), "exception"),
        (KeyError("NCCL"), "exception"),
        (ValueError("[Errno 28] is what I print"), "exception"),
        (AssertionError("FileNotFoundError: no"), "exception"),
        (OSError(28, "No space left on device"), "disk_full"),
        (OSError(122, "Disk quota exceeded", "/home/x"), "disk_full"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), "disk_full"),
        (OSError(12, "Cannot allocate memory"), "host_memory"),
        (MemoryError(), "host_memory"),
        (ModuleNotFoundError("No module named 'a'", name="a"), "import"),
        (ImportError("cannot import name 'b' from 'a' (/a.py)"), "import"),
        (OSError("libx.so.1: cannot open shared object file: No such file or directory"), "import"),
        (FileNotFoundError(2, "No such file or directory", "/data/x"), "missing_file"),
        (FloatingPointError("step 3: loss is nan"), "non_finite"),
        (FloatingPointError("divide by zero"), "exception"),
        (RuntimeError("CUDA error: device-side assert triggered"), "gpu"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "bad_host"),
        (SystemExit(3), "exit"),
    ],
    ids=str,
)
def test_an_exception_has_its_kind(error: BaseException, kind: str) -> None:
    cause = of_error(error)
    assert (cause.kind, cause.is_known) == (kind, True)
    assert (cause.rank, cause.host) == (3, "node1")


def test_a_refusal_of_ours_points_at_no_line() -> None:
    error = WorkloadError("sample 3: a.txt was cut short while it was read; put the rest back")
    cause = of_error(error, record={"workload": "tp_fsdp"})
    assert (cause.kind, cause.file, cause.line) == ("exception", None, None)
    assert cause.sentences[-1] == "The message says what to do."
    own = of_error(error, record={"workload": "mine:ENTRY"})
    assert "Correct that line" in own.sentences[-1]


def test_a_file_that_one_host_lacks() -> None:
    error = FileNotFoundError(2, "No such file or directory", "/data/x")
    other = replace(blame.failure_of(error, 2, "node1", 1.0, LOG), rank=2)
    assert "'/data/x'; only node1 met it before the job ended. " in text_of(of_error(error, failures=(other,)))
    elsewhere = replace(other, rank=0, host="node0")
    assert "'/data/x'; so did every host. " in text_of(of_error(error, failures=(other, elsewhere)))


@pytest.mark.parametrize(
    ("code", "end_of_log", "kind", "is_known"),
    [
        (-signal.SIGKILL, "", "signal", False),
        (-signal.SIGTERM, "", "signal", False),
        (-signal.SIGSEGV, "", "signal", True),
        (-signal.SIGABRT, "", "signal", True),
        (-signal.SIGABRT, "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran", "nccl", True),
        (3, "", "exit", True),
    ],
)
def test_an_end_without_an_exception(code: int, end_of_log: str, kind: str, is_known: bool) -> None:
    cause = of_failure(blame.failure_of_exit(code, 3, "node1", 1.0, LOG, end_of_log))
    assert (cause.kind, cause.is_known) == (kind, is_known)
    assert is_known or "who sent it is not known" in text_of(cause)


def lost(rank: int) -> Failure:
    return blame.failure_of(RuntimeError("[x/gloo/transport/tcp/pair.cc:1] Connection closed"), rank, "h", rank, LOG)


def seen(*steps: int) -> dict[int, LastSeen]:
    return {rank: LastSeen(rank, f"node{rank}", str(step), 5.0, "forward") for rank, step in enumerate(steps)}


def test_where_no_rank_failed_by_itself() -> None:
    """The root cause is named by `blame` alone; if it knows none, neither does this."""
    early = blame.root_cause([lost(0), lost(1)], seen(5, 5, 5), done=[2])
    assert (of_failure(early).kind, of_failure(early).rank) == ("left_early", 2)
    slow = blame.root_cause([lost(0), lost(1)], seen(5, 5, 3), running=[2])
    assert (of_failure(slow).kind, of_failure(slow).rank) == ("hang", 2)
    behind = blame.root_cause([lost(0), lost(1), lost(2)], seen(5, 5, 3))
    assert (of_failure(behind).kind, of_failure(behind).rank) == ("hang", 2)
    unknown = blame.root_cause([lost(0), lost(1)], seen(5, 5))
    assert (of_failure(unknown).kind, of_failure(unknown).is_known) == ("unknown", False)
    assert "pair.cc" not in text_of(of_failure(early))


STACK = 'Thread 0x1 (most recent call first):\n  File "/home/me/train.py", line {line} in train\n'


def shown(*lines: int, returned: int | None = None, state: str = "") -> dict[int, Shown]:
    progress = seen(*(5 for _ in lines))
    return {
        rank: Shown(progress[rank], STACK.format(line=line), state if rank == 1 else "", has_returned=rank == returned)
        for rank, line in enumerate(lines)
    }


def test_a_hang_is_told_as_it_was_found() -> None:
    stopped = hang_cause.root_cause(shown(7, 7, 7, state="is stopped (SIGSTOP)"), 60, 1.0)
    assert (of_failure(stopped).kind, of_failure(stopped).rank) == ("hang", 1)
    assert "kill -CONT" in text_of(of_failure(stopped))
    alone = hang_cause.root_cause(shown(7), 60, 1.0)
    assert (of_failure(alone).file, of_failure(alone).line) == ("/home/me/train.py", 7)
    undecided = hang_cause.root_cause(shown(7, 7), 60, 1.0)
    assert (of_failure(undecided).kind, of_failure(undecided).is_known) == ("hang", False)
    left = hang_cause.root_cause(shown(7, 7, 7, returned=2), 60, 1.0)
    assert of_failure(left).kind in ("left_early", "hang")


@pytest.mark.parametrize(
    ("message", "kind", "is_known"),
    [
        (blame.VANISHED, "unknown", False),
        (blame.silence(5, hears_others=True), "bad_host", True),
        (blame.silence(5, hears_others=False), "bad_host", False),
        (blame.OUT_OF_MEMORY, "host_memory", True),
        ("killed by SIGKILL (out of memory, or someone's kill -9)", "signal", False),
        ("exited with code 127: python: command not found", "launch", True),
        ("RendezvousError: 1 of 2 agents came within 300 s; missing: agent 1 on node1", "rendezvous", True),
        ("ModuleNotFoundError: No module named 'torch'", "import", True),
        ("exited with code 1", "agent", True),
    ],
)
def test_the_end_of_an_agent(message: str, kind: str, is_known: bool) -> None:
    cause = of_failure(Failure(2, "node1", 1.0, "agent", message, log="/run/attempt-0/agent-1.log"))
    assert (cause.kind, cause.is_known, cause.rank, cause.host) == (kind, is_known, None, "node1")


def test_a_traceback_of_another_rank_is_no_evidence() -> None:
    """A rank that left is recorded with the traceback of one that lost it; the place is its own."""
    trace = 'Traceback (most recent call last):\n  File "/home/me/train.py", line 90, in train\n'
    failure = Failure(
        3, "node1", 1.0, "lost_peer", "left its work at train.py:41, act while", trace, LOG, "train.py:41, act"
    )
    assert (of_failure(failure).file, of_failure(failure).line) == ("train.py", 41)


# --- what Slurm did ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("did", "kind"),
    [
        ("TIMEOUT", "time_limit"),
        ("CANCELLED", "cancelled"),
        ("PREEMPTED", "preemption"),
        ("NODE_FAIL", "bad_host"),
        ("BOOT_FAIL", "bad_host"),
        ("OUT_OF_MEMORY", "host_memory"),
        ("DEADLINE", "time_limit"),
        ("STEP_ENDED", "signal"),
    ],
)
def test_a_job_that_slurm_ended(did: str, kind: str) -> None:
    mark = Mark("/run/slurm.log", 4, "*** JOB 7 ON node0 CANCELLED ***")
    cause = of_text("job 7 was ended", slurm_did=did, marks={"slurm": mark}, time_min=10, lost_hosts=["node1"])
    assert cause.kind == kind
    assert cause.is_known == (did != "STEP_ENDED")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            "job 7 ended (FAILED) before any rank was started; its last output: no licence (log: /run/slurm.log)",
            "launch",
        ),
        ("job 7: srun ended with code 1: srun: error: Unable to create step (log: /run/srun.log)", "launch"),
        ("the agent on node1: exited with code 2: ModuleNotFoundError: No module named 'jobs' (log: x)", "import"),
        ("the agent on node1: exited with code 127: python: not found (log: x)", "launch"),
        ("job 7 received SIGTERM on node0 (preemption, or someone's kill)", "signal"),
        ("the time limit of 1 min was reached; ask for more with --time", "time_limit"),
        ("job 7: srun ended with code 9, and no agent left a reason (log: x)", "unknown"),
        ("job 7 ended (FAILED), and no agent left a result or a reason (log: x)", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_job_of_which_no_rank_is_known(error: str, kind: str) -> None:
    cause = of_text(error)
    assert cause.kind == kind
    assert kind != "unknown" or cause.sentences[0] == "The cause is not known."


def test_a_failure_counts_more_than_what_slurm_did_after_it() -> None:
    failure = blame.failure_of(ValueError("x"), 3, "node1", 1.0, LOG)
    facts = Facts("ended", executor="slurm", record={"status": "failed"}, failure=failure, slurm_did="CANCELLED")
    assert cause_of(facts).kind == "exception"


# --- what it did, and what came of it ---------------------------------------------------------------------------------


def test_what_it_did_to_the_others() -> None:
    def effect(**others: int) -> str:
        names = ("lost_their_peer", "failed_themselves", "were_done", "were_still_running")
        details = {
            "others": {name: others.get(name, 0) for name in names},
            "decision": "the job has failed",
            "why": "w",
        }
        return text_of(of_error(ValueError("x"), details=details))

    assert "The other 3 ranks lost their peer." in effect(lost_their_peer=3)
    mixed = effect(lost_their_peer=1, failed_themselves=1, were_still_running=1)
    assert "Of the other 3 ranks, 1 lost its peer, 1 also failed and 1 was still running." in mixed
    assert "restarted" not in mixed


def test_why_it_was_not_restarted() -> None:
    details = {"decision": "the job has failed", "why": "all restarts are used up (--max-restarts 2)"}
    text = text_of(of_error(ValueError("x"), details=details, max_restarts=2, attempt=2, earlier=((1, "rank 1: y"),)))
    assert "It was not restarted: all restarts are used up (--max-restarts 2)." in text
    assert text.endswith("This is attempt 2; attempt 1 had ended: rank 1: y.")


@pytest.mark.parametrize(
    "damaged", [{"others": 3}, {"root_cause": "x"}, {"root_cause": {"step": "9"}}, {"decision": 1}]
)
def test_a_damaged_record_is_no_trouble(damaged: dict[str, Any]) -> None:
    assert of_error(ValueError("x"), details=damaged).kind == "exception"


# --- it waits or runs -------------------------------------------------------------------------------------------------


def waits(reason: str, **known: Any) -> Cause:
    return cause_of(Facts("waits", executor="slurm", job_id="7", state=JobState("PENDING", reason, **known)))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "the hosts that it needs are busy or away"),
        ("Priority", "jobs of a higher priority are before it"),
        ("Dependency", "a job that it depends on"),
        ("DependencyNeverSatisfied", "will never start"),
        ("JobHeldUser", "`scontrol release 7`"),
        ("JobHeldAdmin", "an administrator holds the job"),
        ("BeginTime", "at a set time"),
        ("PartitionTimeLimit", "longer than the partition allows"),
        ("ReqNodeNotAvail, UnavailableNodes:node1", "down, drained or reserved"),
        ("QOSMaxGRESPerUser", "the QOS's maximum of GPUs and the like per user"),
        ("QOSMaxJobsPerUserLimit", "the QOS's maximum of running jobs per user"),
        ("AssocGrpCpuLimit", "your account's limit of CPUs, counted over all its jobs"),
        ("AssocGrpGRES", "share of your account or QOS is in use"),
        ("Licenses", "licenses"),
    ],
)
def test_a_reason_of_slurms_in_words(reason: str, words: str) -> None:
    cause = waits(reason)
    assert (cause.kind, cause.is_known, cause.reason) == ("queue", True, reason)
    assert words in text_of(cause)


def test_a_reason_that_nobody_knows() -> None:
    cause = waits("PhaseOfTheMoon")
    assert (cause.kind, cause.is_known) == ("queue", False)
    assert "not known to meshrun" in text_of(cause)
    assert meaning(JobState("RUNNING", "Priority")) == ""
    assert limit_in_words("QOSPhaseOfTheMoon") == ""


def test_a_job_that_stands_still() -> None:
    said = "no step for 46 s: rank 2 on node1 has been in data (data.py:88, read) for 46 s; 3 ranks wait in all_reduce"
    marks = {"stands": Mark("/run/attempt-0/agent-0.log", 9, said)}
    facts = Facts("runs", ranks=4, step=3, marks=marks, stacks="/run/attempt-0/stacks.txt")
    cause = cause_of(facts)
    assert (cause.kind, cause.rank, cause.host, cause.file, cause.line) == ("standstill", 2, "node1", "data.py", 88)
    assert cause_of(replace(facts, has_moved_since=True)).kind == "running"


def test_sizes_and_times() -> None:
    assert [duration(s) for s in (0.26, 45, 600, 7300, 400_000)] == ["0.3 s", "45 s", "10 min", "2.0 h", "4.6 days"]
    assert [size(n) for n in (5, 2**31, 2**50)] == ["5 bytes", "2 GiB", "1024 TiB"]
