"""What Slurm says of a job, over its commands' outputs as they were recorded (22.05), and who is asked when."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from jobs.slurm import environment, query
from jobs.slurm.query import Forgotten, JobState, NoAnswer, read_sacct, read_scontrol, read_squeue

UNKNOWN = "slurm_load_jobs error: Invalid job id specified\n"
UNREACHABLE = (
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"  # after 9 s of a killed slurmctld
)
DISABLED = "Slurm accounting storage is disabled\n"
DOWN = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"


@pytest.mark.parametrize(
    ("out", "state"),
    [
        ("12|RUNNING|2026-11-22T11:31:31|node[0-1]|None|/r/s.sh", JobState("RUNNING", nodes="node[0-1]")),
        ("12|PENDING|N/A||None|/r/s.sh", JobState("PENDING")),
        (
            "12|PENDING|2026-11-22T11:32:31||Resources|/r/s.sh",
            JobState("PENDING", "Resources", start="2026-11-22T11:32:31"),
        ),
        (
            "12|PENDING|2026-11-22T11:28:25||BeginTime|/r/s.sh",
            JobState("PENDING", "BeginTime", start="2026-11-22T11:28:25"),
        ),
        (
            "12|FAILED|2026-11-22T11:25:46|node[0-1]|NonZeroExitCode|/r/s.sh",
            JobState("FAILED", "NonZeroExitCode", "node[0-1]"),
        ),
        ("12|TIMEOUT|2026-11-22T11:31:31|node[0-1]|TimeLimit|/r/s.sh", JobState("TIMEOUT", "TimeLimit", "node[0-1]")),
        ("12|COMPLETING|2026-11-22T11:31:31|node0|None|/r/s.sh", JobState("COMPLETING", nodes="node0")),
        (f"12|PENDING|N/A||{DOWN}|/r/s.sh", JobState("PENDING", DOWN)),
        (
            "12|PENDING|N/A||ReqNodeNotAvail, UnavailableNodes:gpu[1-2]|/r/s.sh",
            JobState("PENDING", "ReqNodeNotAvail, UnavailableNodes:gpu[1-2]"),
        ),
        ("11|RUNNING|x|n1|None|/r/s.sh\n12|RUNNING|x|n2|None|/r/s.sh", JobState("RUNNING", nodes="n2")),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_squeue(out: str, state: JobState) -> None:
    assert read_squeue(0, out + "\n", "", "12") == state


SCRIPT = ".submission_file_1.sh"
OURS, THEIRS = f"/a|b c/submitit/{SCRIPT}", "/runs/submitit/.submission_file_2.sh"
NUMBER_REUSED = Forgotten("another job has this number now")


@pytest.mark.parametrize("theirs", [THEIRS, "(null)", "/bin/bash"])
def test_a_number_that_is_another_jobs_now(theirs: str) -> None:
    """Slurm gives it again where a controller is set up anew; accounting may still have one of before."""
    row = "12|RUNNING|x|n1|None|"
    running = JobState("RUNNING", nodes="n1")
    assert read_squeue(0, row + OURS, "", "12", SCRIPT) == running
    assert read_squeue(0, row + theirs, "", "12", SCRIPT) == NUMBER_REUSED
    assert read_squeue(0, row, "", "12", SCRIPT) == running  # of a Slurm that does not say
    failed = "12|FAILED|n1"
    assert read_sacct(0, f"{failed}|sbatch {OURS}", "", "12", SCRIPT) == JobState("FAILED", nodes="n1", source="sacct")
    assert read_sacct(0, f"{failed}|sbatch {theirs}", "", "12", SCRIPT) == NUMBER_REUSED
    assert isinstance(read_sacct(0, f"{failed}|", "", "12", SCRIPT), JobState)
    assert isinstance(read_sacct(0, failed, "", "12", SCRIPT), JobState)
    assert isinstance(read_scontrol(0, SHOWN.replace("/a b/job.sh x=1", OURS), "", SCRIPT), JobState)
    assert read_scontrol(0, SHOWN.replace("/a b/job.sh x=1", theirs), "", SCRIPT) == NUMBER_REUSED


def test_whoever_has_the_number_now_is_not_taken_for_ours(site: dict[str, str]) -> None:
    say(site, "squeue", f"12|RUNNING|x|n1|None|{THEIRS}")
    say(site, "sacct", err=DISABLED, code=1)
    assert query.ask("12", site, SCRIPT) == NUMBER_REUSED
    for row in (f"COMPLETED|n1|sbatch {THEIRS}", "PENDING|n1|"):
        say(site, "sacct", f"12|{row}")
        assert query.ask("12", site, SCRIPT) == NUMBER_REUSED
    say(site, "sacct", f"12|TIMEOUT|n1|sbatch {OURS}")  # of an accounting that keeps both
    assert query.ask("12", site, SCRIPT) == JobState("TIMEOUT", nodes="n1", source="sacct")
    # An end of long ago is none of ours, while the controller is away.
    say(site, "squeue", err=UNREACHABLE, code=1)
    say(site, "sacct", f"12|COMPLETED|n1|sbatch {THEIRS}")
    assert query.ask("12", site, SCRIPT) == NoAnswer(UNREACHABLE.strip())


def test_an_accounting_that_keeps_no_scripts_is_asked_for_less(site: dict[str, str]) -> None:
    say(site, "squeue", err=UNKNOWN, code=1)
    refuses = 'case "$*" in *SubmitLine*) echo "sacct: error: Invalid field requested: x" >&2; exit 1;; esac'
    say(site, "sacct", "12|FAILED|n1", before=refuses)
    assert query.ask("12", site, SCRIPT) == JobState("FAILED", nodes="n1", source="sacct")


@pytest.mark.parametrize(
    ("code", "out", "err", "answer"),
    [
        (1, "", UNKNOWN, Forgotten()),
        (0, "", "", Forgotten()),
        (0, "13|RUNNING|x|n1|None|/r/s.sh\n", "", Forgotten()),
        (1, "", UNREACHABLE, NoAnswer(UNREACHABLE.strip())),
        (1, "", "", NoAnswer("squeue ended with code 1")),
        (1, "", "squeue: error: a\nsqueue: fatal: b\n", NoAnswer("squeue: error: a squeue: fatal: b")),
        # A warning beside an answer is no reason not to take it.
        (0, "12|RUNNING|x|n1|None|/r/s.sh\n", "squeue: warning: x\n", JobState("RUNNING", nodes="n1")),
    ],
)
def test_squeue_that_knows_nothing(code: int, out: str, err: str, answer: query.Answer) -> None:
    assert read_squeue(code, out, err, "12") == answer


@pytest.mark.parametrize(
    ("code", "out", "err", "answer"),
    [
        (0, "12|FAILED|node[0-1]\n", "", JobState("FAILED", nodes="node[0-1]", source="sacct")),
        (0, "12|CANCELLED by 0|node0\n", "", JobState("CANCELLED", nodes="node0", by="0", source="sacct")),
        (0, "12|PENDING|None assigned\n", "", JobState("PENDING", source="sacct")),
        (0, "", "", Forgotten()),
        (1, "", DISABLED, NoAnswer(DISABLED.strip())),
        (1, "", "sacct: error: Problem talking to the database: Connection refused\n", None),
    ],
)
def test_sacct(code: int, out: str, err: str, answer: query.Answer | None) -> None:
    assert read_sacct(code, out, err, "12") == (answer or NoAnswer(err.strip()))


SHOWN = (
    "JobId=347716 JobName=job.sh UserId=root(0) GroupId=root(0) Priority=4294901755 Account=(null) QOS=(null) "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 ExitCode=0:0 RunTime=00:00:02 "
    "StartTime=2026-11-22T11:28:25 EndTime=Unknown PreemptEligibleTime=2026-11-22T11:28:25 PreemptTime=None "
    "ReqNodeList=(null) ExcNodeList=(null) NodeList=node1 BatchHost=node1 Command=/a b/job.sh x=1\n"
)


def test_scontrol() -> None:
    expected = JobState("RUNNING", nodes="node1", restarts=1, source="scontrol")
    assert read_scontrol(0, SHOWN, "") == expected
    preempted = read_scontrol(0, SHOWN.replace("PreemptTime=None", "PreemptTime=2026-11-22T11:29:00"), "")
    assert isinstance(preempted, JobState)
    assert preempted.preempted
    assert read_scontrol(1, "", UNKNOWN) == Forgotten()
    assert read_scontrol(1, "", UNREACHABLE) == NoAnswer(UNREACHABLE.strip())


def test_ends() -> None:
    assert [s for s in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED") if JobState(s).ended] == []
    assert all(JobState(s).ended for s in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL"))
    assert JobState("NODE_FAIL").may_return
    assert not JobState("TIMEOUT").may_return


def test_what_needs_explaining_is_explained() -> None:
    for reason in ("PartitionNodeLimit", "ReqNodeNotAvail, Reserved", "JobHeldUser", "launch failed requeued held"):
        assert query.hint(JobState("PENDING", reason))
    for reason in ("Resources", "Priority", ""):
        assert query.hint(JobState("PENDING", reason)) == ""
    assert query.hint(JobState("RUNNING", "PartitionNodeLimit")) == ""
    # What others of the account use is another thing than what one job may ask for.
    assert "starts when other jobs" in query.hint(JobState("PENDING", "AssocGrpCpuLimit"))
    assert "a limit of your account" in query.hint(JobState("PENDING", "QOSMaxJobsPerUserLimit"))
    assert "not valid" in query.hint(JobState("PENDING", "InvalidQOS"))


def test_the_environment_to_ask_in_has_nobodys_preferences() -> None:
    env = environment.for_queries(
        {"SQUEUE_FORMAT": "%all", "SACCT_FORMAT": "x", "SLURM_TIME_FORMAT": "relative", "SLURM_CONF": "/c", "PATH": "/"}
    )
    assert env == {"SLURM_CONF": "/c", "PATH": "/", "SLURM_TIME_FORMAT": "standard"}


# --- who is asked -----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """The environment of a site whose commands say what `say` has them say."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cat", "sleep"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    return {"PATH": f"{tmp_path}:{tools}", "SITE": str(tmp_path)}


def say(site: dict[str, str], command: str, out: str = "", err: str = "", code: int = 0, before: str = "") -> None:
    path = Path(site["SITE"]) / command
    body = f"cat <<'E'\n{out}\nE\n" if out else ""
    body += f"cat >&2 <<'E'\n{err.rstrip()}\nE\n" if err else ""
    path.write_text(f'#!/bin/sh\necho {command} "$@" >> {site["SITE"]}/asked\n{before}\n{body}exit {code}\n')
    path.chmod(0o755)


def asked(site: dict[str, str]) -> list[str]:
    return [line.split()[0] for line in (Path(site["SITE"]) / "asked").read_text().splitlines()]


def test_squeue_comes_first(site: dict[str, str]) -> None:
    say(site, "squeue", "12|RUNNING|x|n1|None|/r/s.sh")
    say(site, "sacct", "12|FAILED|n1")
    assert query.ask("12", site) == JobState("RUNNING", nodes="n1")
    assert asked(site) == ["squeue"]


def test_accounting_knows_who_cancelled(site: dict[str, str]) -> None:
    say(site, "squeue", "12|CANCELLED|x|n1|None|/r/s.sh")
    say(site, "sacct", "12|CANCELLED by 7|n1")
    assert query.ask("12", site) == JobState("CANCELLED", nodes="n1", by="7")
    say(site, "sacct", err=DISABLED, code=1)
    assert query.ask("12", site) == JobState("CANCELLED", nodes="n1")


def test_what_squeue_has_forgotten_accounting_may_know(site: dict[str, str]) -> None:
    say(site, "squeue", err=UNKNOWN, code=1)
    say(site, "sacct", "12|COMPLETED|n1")
    assert query.ask("12", site) == JobState("COMPLETED", nodes="n1", source="sacct")
    say(site, "sacct", err=DISABLED, code=1)
    assert query.ask("12", site) == Forgotten(f"accounting: {DISABLED.strip()}")


def test_while_the_controller_is_down_accounting_is_believed_in_ends_only(site: dict[str, str]) -> None:
    say(site, "squeue", err=UNREACHABLE, code=1)
    say(site, "sacct", "12|RUNNING|n1")
    assert query.ask("12", site) == NoAnswer(UNREACHABLE.strip())
    say(site, "sacct", "12|NODE_FAIL|n1")
    assert query.ask("12", site) == NoAnswer(UNREACHABLE.strip())
    say(site, "sacct", "12|TIMEOUT|n1")
    assert query.ask("12", site) == JobState("TIMEOUT", nodes="n1", source="sacct")


def test_without_squeue_scontrol_is_asked(site: dict[str, str]) -> None:
    say(site, "scontrol", SHOWN)
    say(site, "sacct", err=DISABLED, code=1)
    answer = query.ask("347716", site)
    assert isinstance(answer, JobState)
    assert (answer.state, answer.source) == ("RUNNING", "scontrol")


def test_many_jobs_are_asked_about_at_once(site: dict[str, str]) -> None:
    scripts = {"11": "", "12": SCRIPT, "13": ""}
    say(site, "squeue", f"12|RUNNING|x|n1|None|{OURS}\n13|PENDING|N/A||Priority|/r/s.sh\n14|RUNNING|x|n1|None|/r/s.sh")
    say(site, "sacct", f"11|CANCELLED by 1000|n1|\n12|FAILED|n1|sbatch {THEIRS}")
    assert query.ask_queue(scripts, site) == {
        "11": Forgotten(),
        "12": JobState("RUNNING", nodes="n1"),
        "13": JobState("PENDING", "Priority"),
    }
    assert query.ask_accounting(scripts, site) == {
        "11": JobState("CANCELLED", nodes="n1", by="1000", source="sacct"),
        "12": NUMBER_REUSED,
        "13": Forgotten(),
    }
    assert asked(site) == ["squeue", "sacct"]
    say(site, "squeue", err=UNREACHABLE, code=1)
    assert {type(answer) for answer in query.ask_queue(scripts, site).values()} == {NoAnswer}
    say(site, "squeue", err=UNKNOWN, code=1)
    assert query.ask_queue({"11": ""}, site) == {"11": Forgotten()}


def test_jobs_that_cannot_be_cancelled_are_named(site: dict[str, str], tmp_path: Path) -> None:
    say(site, "scancel")
    assert query.cancel(["1", "2"], site) == {}
    refused = "scancel: error: Kill job error on job id 2: Access/permission denied"
    say(site, "scancel", err=refused, code=1)
    assert query.cancel(["1", "2"], site) == {"2": refused}
    say(site, "scancel", err="scancel: error: slurm_kill_job: Unable to contact slurm controller", code=1)
    assert query.cancel(["1", "2"], site).keys() == {"1", "2"}
    assert query.cancel(["1"], {"PATH": str(tmp_path / "none")}) == {"1": "scancel: No such file or directory"}


def test_the_hosts_that_are_down(site: dict[str, str]) -> None:
    say(site, "sinfo", "n1\nn1\nn3")  # once for each partition
    assert query.hosts_down("n[0-3]", site) == ("n1", "n3")
    assert "--nodes=n[0-3]" in (Path(site["SITE"]) / "asked").read_text()
    say(site, "sinfo", err="sinfo: error: x", code=1)
    assert query.hosts_down("n[0-3]", site) == ()
    assert query.hosts_down("", {}) == ()


def test_no_slurm_here(tmp_path: Path) -> None:
    answer = query.ask("12", {"PATH": str(tmp_path)})
    assert answer == NoAnswer("squeue: No such file or directory")


def test_a_command_that_hangs_is_left(site: dict[str, str]) -> None:
    for command in ("squeue", "sacct"):
        say(site, command, before="exec sleep 600")
    before = time.monotonic()
    assert query.ask("12", site, within_s=0.3) == NoAnswer("squeue did not answer within 0.3 s")
    assert time.monotonic() - before < 10


def test_an_element_of_an_array_is_found_by_the_script_of_all_and_its_index(site: dict[str, str]) -> None:
    rows = ["12_0|/s/submitit/a.sh", "12_10|/s/submitit/a.sh", "13|/other/a.sh"]
    say(site, "squeue", "\n".join(rows))
    assert query.find(Path("/s/submitit"), site, "10") == "12_10"
    assert query.find(Path("/s/submitit"), site, "1") == ""
    assert query.find(Path("/other"), site) == "13"


def test_a_site_says_how_long_an_array_may_be(site: dict[str, str]) -> None:
    assert query.most_points(site) is None
    say(site, "scontrol", "MaxArraySize            = 1001\nMaxJobCount             = 10000")
    assert query.most_points(site) == 1001


def test_an_element_that_scancel_could_not_end_has_its_own_reason(site: dict[str, str]) -> None:
    say(site, "scancel", err="scancel: error: Kill job error on job id 12_3: Access/permission denied", code=1)
    assert list(query.cancel(["12_3", "12_4"], site)) == ["12_3"]
