"""A job of Slurm's that is followed: what is made of each answer of Slurm's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.blame import Failure
from jobs.cli.console import Console
from jobs.cli.main import main
from jobs.cli.progress import Display
from jobs.cli.verbs import resume
from jobs.cli.watch import watch
from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, Submitted, read_json, write_json
from jobs.runs import slurm_job
from tests.jobs.slurm.test_query import DISABLED, UNKNOWN, UNREACHABLE, say
from tests.jobs.submitting import wait_until

Capture = pytest.CaptureFixture[str]
Later = Callable[[float, Callable[[], Any]], None]
JOB = json.dumps({"workload": "mine", "settings": {"steps": 9}, "resources": {"nodes": 2, "gpus_per_node": 1}})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


DONE = {"status": "done", "workload": "mine", "attempt": 0, "seconds": 5.0, "result": {"total": 3}}
FAILED = {
    "status": "failed",
    "workload": "mine",
    "attempt": 0,
    "error": "rank 1 on n1: ValueError: mine (log: /l)",
    "traceback": "Traceback\n  mine.py",
    "failure": {"rank": 1},
}


def _row(state: str, reason: str = "None", start: str = "N/A") -> str:
    return f"12|{state}|{start}|{'' if state in ('PENDING', 'REQUEUED') else 'n[0-1]'}|{reason}|/r/s.sh"


class Site:
    """A run directory of job 12, and Slurm's commands, which say what they are told to say."""

    def __init__(self, directory: Path) -> None:
        self.env = {"SITE": str(directory)}
        self.run = RunDirectory(directory / "run")
        self.run.attempt(0).make()
        self.run.job.write_text(JOB)
        self.run.record_submission(Submitted("slurm", "12", "2026-11-22T08:15:30Z", "login"))
        self.sacct(err=DISABLED)

    def squeue(self, line: str = "", err: str = "") -> None:
        say(self.env, "squeue", line, err, int(bool(err)))

    def sacct(self, line: str = "", err: str = "") -> None:
        say(self.env, "sacct", line, err, int(bool(err)))

    def state(self, state: str, reason: str = "None", start: str = "N/A") -> None:
        self.squeue(_row(state, reason, start))

    def states(self, *states: tuple[str, ...]) -> None:
        """One answer after another; the last one for ever."""
        answers = Path(self.env["SITE"]) / "answers"
        answers.write_text("".join(_row(*state) + "\n" for state in states))
        pop = f"head -n 1 {answers}; [ $(wc -l < {answers}) = 1 ] || sed -i 1d {answers}"
        say(self.env, "squeue", before=pop)

    def asked(self) -> int:
        path = Path(self.env["SITE"]) / "asked"
        return path.read_text().count("squeue") if path.exists() else 0

    def wait_for_answer(self) -> None:
        """Returns when squeue has given an answer from now on: the one after the next question has begun."""
        asked = self.asked()
        wait_until(lambda: self.asked() >= asked + 2, "squeue is asked")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Deadlines are a fraction of what they are."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cat", "sleep", "head", "wc", "sed"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{tools}")
    monkeypatch.setattr(slurm_job, "ASK_EVERY_S", (0.1, 0.3))
    for constant, seconds in (
        ("RESULT_WITHIN_S", 1.5),
        ("RECORD_WITHIN_S", 0.3),
        ("STAYS_S", 3.0),
        ("COMPLETING_S", 3.0),
    ):
        monkeypatch.setattr(slurm_job, constant, seconds)
    monkeypatch.setattr(slurm_job, "UNREACHABLE_S", 2.0)
    monkeypatch.setattr(slurm_job, "POLL_S", 0.1)
    return Site(tmp_path)


def test_a_result_that_is_there_is_told_without_asking(site: Site, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, DONE)
    assert main(["wait", "run"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("done in 5.0 s\n  total: 3\n", "")
    assert site.asked() == 0


@pytest.mark.parametrize("words", [["runs/one"], ["one"], ["./runs/one/"]], ids=str)
def test_a_run_by_its_path_or_its_name(words: list[str], site: Site, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, DONE)
    Path("runs").mkdir()
    site.run.path.rename("runs/one")
    assert main(["wait", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record == {**DONE, "job_id": "12", "exit_code": 0, "run_dir": str(Path("runs/one").absolute())}
    assert err == "done in 5.0 s\n  total: 3\n"


def test_a_failure_that_is_there(site: Site, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, FAILED)
    site.state("FAILED", "NonZeroExitCode")
    assert main(["wait", "run"]) == 1
    err = capsys.readouterr().err
    assert err == "Traceback\n  mine.py\nmeshrun: error: the job failed: rank 1 on n1: ValueError: mine (log: /l)\n"


@pytest.mark.parametrize("err", [UNKNOWN, UNREACHABLE])
def test_a_failure_of_long_ago_is_told_whatever_slurm_says(err: str, site: Site, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, FAILED)
    os.utime(site.run.attempt(0).result, (1e9, 1e9))
    site.squeue(err=err)
    assert main(["wait", "run"]) == 1
    assert "the job failed: rank 1 on n1" in capsys.readouterr().err


def test_a_failure_of_long_ago_where_there_is_no_slurm(site: Site, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, FAILED)
    os.utime(site.run.attempt(0).result, (1e9, 1e9))
    (Path(site.env["SITE"]) / "sacct").unlink()
    assert main(["wait", "run"]) == 1
    assert "the job failed: rank 1 on n1" in capsys.readouterr().err


def test_the_queue_is_shown_when_it_changes(site: Site) -> None:
    estimates = [("PENDING", "Resources", f"2026-11-22T{when}:31") for when in ("11:32", "11:32", "11:35", "12:35")]
    site.states(("PENDING", "Priority"), ("PENDING", "Priority"), *estimates, ("RUNNING",), ("RUNNING",))
    said: list[str] = []

    class Shown(Console):
        """The job goes on when it is seen to run."""

        def say(self, text: str = "") -> None:
            said.append(text)
            if "RUNNING" in text:
                site.run.attempt(0).metrics.write_text('{"step": 1, "loss": 0.5}\n{"step": 9, "loss": 0.25}\n')
            if "step 9" in text:
                write_json(site.run.attempt(0).result, DONE)
                site.state("COMPLETED")

    submitted = site.run.submitted()
    assert submitted is not None
    assert watch(site.run, submitted, Shown(as_json=False), from_the_start=True) == 0
    assert [line.partition(" in ")[0] for line in said if "total" not in line] == [
        "job 12: PENDING (Priority)",
        "job 12: PENDING (Resources), expected to start 2026-11-22 11:32",
        "job 12: PENDING (Resources), expected to start 2026-11-22 12:35",
        "job 12: RUNNING on n[0-1]",
        "step 1/9  loss 0.5",
        "step 9/9  loss 0.25",
        "job 12: COMPLETED",
        "done",
    ]


def test_a_reason_that_needs_it_is_explained(site: Site, later: Later, capsys: Capture) -> None:
    site.state("PENDING", "PartitionNodeLimit", "2099-11-22T11:32:31")
    later(0, lambda: (site.wait_for_answer(), site.state("CANCELLED")))
    assert main(["wait", "run"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [
        "job 12: PENDING (PartitionNodeLimit)",  # in 70 years is no estimate
        "  the partition has, or allows, fewer hosts than --nodes asks for; cancel the job and submit it with fewer",
    ]
    assert err == "meshrun: error: the job failed: job 12 was cancelled before it started\n"


def test_of_a_job_that_is_done_and_whose_ranks_stay_both_are_told(site: Site, later: Later, capsys: Capture) -> None:
    site.state("RUNNING")
    later(0, lambda: (site.wait_for_answer(), write_json(site.run.attempt(0).result, DONE)))
    assert main(["wait", "run"]) == 0
    assert "the work is done, but Slurm still says RUNNING: threads or exit hooks" in capsys.readouterr().out


def test_slurm_is_asked_seldom_and_at_once_when_a_result_comes(
    site: Site, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_job, "ASK_EVERY_S", (30.0, 60.0))
    site.state("RUNNING")
    later(1.0, lambda: (site.state("FAILED"), write_json(site.run.attempt(0).result, FAILED)))
    before = time.monotonic()
    assert main(["wait", "run"]) == 1
    assert time.monotonic() - before < 20
    assert site.asked() <= 2


@pytest.mark.parametrize("first", ["NODE_FAIL", "PREEMPTED", "REQUEUED"])
def test_a_job_that_slurm_starts_again_has_not_ended(first: str, site: Site, later: Later, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, {**FAILED, "failure": None})
    site.run.show_newest()
    site.run.attempt(0).metrics.write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n{"step": 3, "loss": 0.5}\n'
    )
    site.states((first,), (first,), ("PENDING", "BeginTime"), ("PENDING", "BeginTime"), ("RUNNING",))

    def second() -> None:
        site.run.begin_attempt().metrics.write_text('{"step": 9, "loss": 0.25}\n')
        write_json(site.run.attempt(1).result, {**DONE, "attempt": 1})
        site.state("COMPLETED")

    later(2.5, second)
    assert main(["wait", "run"]) == 0
    out = capsys.readouterr().out
    for words in ("job 12: PENDING (BeginTime)\n", "attempt 1 begins", "step 9/9", "total: 3"):
        assert words in out


def test_a_job_may_be_resumed_once_slurm_says_that_it_has_ended(site: Site) -> None:
    """Which it is asked only then, and may first say that it completes it."""
    site.states(("COMPLETING",), ("COMPLETING",), ("FAILED",))
    write_json(site.run.attempt(0).result, FAILED)
    resume._refuse_if_it_runs(site.run)
    assert site.asked() >= 3


def test_a_job_that_runs_is_not_resumed(site: Site) -> None:
    site.state("RUNNING")
    with pytest.raises(CommandLineError, match="its job 12 has not ended, as far as is known"):
        resume._refuse_if_it_runs(site.run)


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED"])
def test_one_that_is_not_started_again_has(state: str, site: Site, capsys: Capture) -> None:
    site.state(state)
    assert main(["wait", "run"]) == 1
    told = {"NODE_FAIL": "a host of job 12 failed", "PREEMPTED": "job 12 was preempted by Slurm"}[state]
    assert told in capsys.readouterr().err
    assert read_json(site.run.attempt(0).result)["slurm_state"] == state


def test_a_host_that_took_the_job_with_it_is_named(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that ran the batch script and srun leaves no word of either."""
    monkeypatch.setattr(slurm_job, "STAYS_S", 0.5)
    site.state("NODE_FAIL")
    say(site.env, "sinfo", "n0")
    assert main(["wait", "run"]) == 1
    assert "the job failed: n0 failed, which ended job 12" in capsys.readouterr().err


def test_a_record_of_an_earlier_attempt_is_not_the_end(site: Site, later: Later, capsys: Capture) -> None:
    write_json(site.run.attempt(0).result, FAILED)
    site.run.attempt(1).make()
    site.state("TIMEOUT", "TimeLimit")
    assert main(["wait", "run"]) == 1
    assert "job 12 reached its time limit; ask for more with --time" in capsys.readouterr().err
    assert read_json(site.run.result)["attempt"] == 1
    assert read_json(site.run.attempt(0).result) == FAILED


def test_a_done_job_that_slurm_calls_failed_is_done_and_it_is_said(site: Site, later: Later, capsys: Capture) -> None:
    site.state("RUNNING")
    later(0.5, lambda: (write_json(site.run.attempt(0).result, DONE), site.state("FAILED", "NonZeroExitCode")))
    assert main(["wait", "run"]) == 0
    assert "the work is done, but Slurm says FAILED (NonZeroExitCode)" in capsys.readouterr().out


def test_a_completed_job_whose_result_comes_late(site: Site, later: Later) -> None:
    site.state("COMPLETED")
    later(0.5, lambda: write_json(site.run.attempt(0).result, DONE))
    assert main(["wait", "run"]) == 0


def test_a_completed_job_without_a_result_has_failed(site: Site, capsys: Capture) -> None:
    site.run.attempt(0).make().agent_log(0).touch()
    site.state("COMPLETED")
    assert main(["wait", "run"]) == 1
    assert "every rank finished its work, but none left a result" in capsys.readouterr().err


def test_a_job_that_ends_while_its_last_processes_do_not(site: Site, capsys: Capture) -> None:
    site.state("COMPLETING")
    write_json(site.run.attempt(0).result, FAILED)
    assert main(["wait", "run"]) == 1
    assert "rank 1 on n1: ValueError" in capsys.readouterr().err


def test_what_accounting_alone_remembers(site: Site, capsys: Capture) -> None:
    site.squeue(err=UNKNOWN)
    site.sacct(f"12|CANCELLED by {os.getuid()}|n[0-1]")
    site.run.attempt(0).log(0).touch()
    assert main(["wait", "run", "--json"]) == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["status"], record["exit_code"], record["slurm_state"]) == ("failed", 1, "CANCELLED")
    assert "job 12 was cancelled by " in err


def test_what_nobody_remembers(site: Site, capsys: Capture) -> None:
    site.squeue(err=UNKNOWN)
    assert main(["wait", "run", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "unknown"
    assert err == (
        f"meshrun: error: Slurm no longer knows job 12, and nothing in {site.run.path} says how it ended "
        "(accounting: Slurm accounting storage is disabled)\n"
    )
    assert not site.run.attempt(0).result.exists()


ANYTHING = (b"\xff\xfe", b"", b"[1", b"[1]", b"null", b"1" * 5000, b"[" * 100_000)
WRONG = (None, 5, 1e999, "x", [], {})


def _otherwise(path: Path) -> Iterator[bytes]:
    """What one of our files could hold instead: nothing of ours, or what is ours with values of other types."""
    record = json.loads(path.read_text())
    yield from ANYTHING
    for wrong in record:
        yield from (json.dumps({**record, wrong: value}).encode() for value in WRONG)
        yield json.dumps({key: value for key, value in record.items() if key != wrong}).encode()


@pytest.mark.parametrize("which", ["job", "submission", "result", "metrics", "failures/1.json"])
def test_a_run_directory_may_hold_anything(
    which: str, site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant in ("RESULT_WITHIN_S", "RECORD_WITHIN_S", "STAYS_S", "UNREACHABLE_S", "POLL_S"):
        monkeypatch.setattr(slurm_job, constant, 0.001)
    monkeypatch.setattr(slurm_job, "ASK_EVERY_S", (0.0, 0.0))
    site.state("FAILED", "NonZeroExitCode")
    attempt = site.run.attempt(0).make()
    failure = Failure(1, "n1", 1e9, "error", "ValueError: mine", "Traceback\n", "/l")
    write_json(attempt.failure(1), failure.to_json())
    write_json(site.run.attempt(0).metrics, {"step": 1, "total_steps": 2, "loss": 0.5, "strategy": "fsdp"})
    if which == "result":
        write_json(site.run.attempt(0).result, {**FAILED, "failure": failure.to_json()})
    of_attempt = {"failures/1.json": attempt.failure(1), "result": attempt.result, "metrics": attempt.metrics}
    path = of_attempt[which] if which in of_attempt else getattr(site.run, which)
    contents: list[bytes | Callable[[], None]] = [*_otherwise(path)]
    contents += [path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")]
    for content in contents:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        content() if callable(content) else path.write_bytes(content)
        if which == "metrics":
            Display(site.run, Console(as_json=True)).update(ended=True)
        if which != "result":
            site.run.attempt(0).result.unlink(missing_ok=True)
        code = main(["wait", "run", "--json"])
        record = json.loads(capsys.readouterr().out)
        assert record["status"] != "crashed", (content, record)
        assert code == record["exit_code"]


def test_a_controller_that_is_away_for_a_while(site: Site, later: Later, capsys: Capture) -> None:
    site.state("RUNNING")

    def story() -> None:
        site.wait_for_answer()
        site.squeue(err=UNREACHABLE)
        site.wait_for_answer()
        site.run.attempt(0).metrics.write_text('{"step": 9, "loss": 0.25}\n')
        site.wait_for_answer()
        site.state("RUNNING")
        site.wait_for_answer()
        write_json(site.run.attempt(0).result, DONE)
        site.state("COMPLETED")

    later(0, story)
    assert main(["wait", "run"]) == 0
    out = capsys.readouterr().out
    assert out.count("Slurm does not answer (slurm_load_jobs error: Unable to contact slurm controller") == 1
    assert out.index("does not answer") < out.index("step 9/9")


def test_a_controller_that_does_not_come_back(site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_job, "SILENT_S", (0.0, 0.5))
    site.squeue(err=UNREACHABLE)
    assert main(["wait", "run", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "unknown"
    assert err.count("job 12: no answer from Slurm for ") >= 3  # before the first answer, and again and again
    assert "Slurm has not answered for" in err
    assert "job 12 may still be running; follow it: python submit.py wait run" in err
    assert not site.run.attempt(0).result.exists()


def scripted(site: Site) -> str:
    """Leaves the batch script, as a submission does; its path."""
    site.run.submitit.mkdir()
    script = site.run.submitit / ".submission_file_1.sh"
    script.touch()
    return str(script)


@pytest.mark.parametrize("recorded", [False, True])
def test_the_job_of_another_that_has_the_number_now(recorded: bool, site: Site, capsys: Capture) -> None:
    scripted(site)
    if recorded:
        write_json(site.run.attempt(0).result, {**FAILED, "failure": None})
    site.squeue("12|COMPLETED|N/A|n[0-1]|None|(null)")
    assert main(["wait", "run"]) == 1
    out, err = capsys.readouterr()
    assert ("rank 1 on n1: ValueError" if recorded else "says how it ended (another job has this number now)") in err
    assert out == ""
    assert site.run.attempt(0).result.exists() == recorded


def test_a_job_whose_number_sbatch_could_not_give(site: Site, capsys: Capture) -> None:
    site.run.submission.unlink()
    script = scripted(site)
    site.squeue(err=UNREACHABLE)
    assert main(["wait", "run"]) == 2
    assert (
        "sbatch could not tell whether it queued the job, and Slurm knows no job with its script"
        in capsys.readouterr().err
    )
    answer = f'case "$*" in *--me*) echo "13|{script}"; exit;; esac'
    say(site.env, "squeue", f"13|CANCELLED|N/A||None|{script}", before=answer)
    assert main(["wait", "run"]) == 1
    assert "job 13 was cancelled" in capsys.readouterr().err
    assert read_json(site.run.submission)["job_id"] == "13"


def test_a_job_that_ends_while_the_controller_is_away(site: Site, later: Later) -> None:
    site.squeue(err=UNREACHABLE)
    later(0.5, lambda: write_json(site.run.attempt(0).result, DONE))
    assert main(["wait", "run"]) == 0


def test_a_slow_controller_does_not_hold_up_the_progress(site: Site, later: Later, capsys: Capture) -> None:
    say(site.env, "squeue", "12|COMPLETED|x|n0|None|/r/s.sh", before="exec sleep 20")
    shown: list[float] = []
    began = time.monotonic()
    later(0.5, lambda: write_json(site.run.attempt(0).result, DONE))
    later(0.5, lambda: site.run.attempt(0).metrics.write_text('{"step": 9, "loss": 0.25}\n'))
    assert watch(site.run, Submitted("slurm", "12", "", ""), _Console(shown)) == 0
    assert shown[0] - began < 10


class _Console(Console):
    """Notes when the first step was shown."""

    def __init__(self, shown: list[float]) -> None:
        super().__init__(as_json=False)
        self.shown = shown

    def say(self, text: str = "") -> None:
        if text.startswith("step"):
            self.shown.append(time.monotonic())


def test_a_job_in_the_queue_is_not_looked_for_on_disk(
    site: Site, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has nothing there, and a thousand lines that wait for theirs would ask the file system for nothing else."""
    looked: list[bool] = []
    monkeypatch.setattr(Display, "update", lambda display, ended=False: looked.append(ended))
    site.state("PENDING", "Priority")
    in_the_queue: list[int] = []
    later(1.5, lambda: (site.wait_for_answer(), in_the_queue.append(len(looked)), site.state("CANCELLED")))
    assert watch(site.run, Submitted("slurm", "12", "", ""), Console(as_json=False)) == 1
    assert in_the_queue[0] <= 3  # until Slurm has answered
    assert looked[-1]


def test_a_running_job_is_looked_at_once_a_second_and_left_at_once(
    site: Site, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    monkeypatch.setattr(slurm_job, "POLL_S", 20.0)
    monkeypatch.setattr(slurm_job, "ASK_EVERY_S", (1.0, 1.0))
    monkeypatch.setattr(Display, "update", lambda display, ended=False: looked.append(ended))
    site.state("RUNNING")
    later(1.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = time.monotonic()
    assert main(["wait", "run"]) == 130
    assert time.monotonic() - before < 10
    assert len(looked) <= 3


def test_a_late_comer_sees_the_last_lines_and_the_last_step(site: Site, later: Later, capsys: Capture) -> None:
    log = "".join(f"line {number}\n" for number in range(99_997))
    # Colors, a bar that is drawn over itself, and what would set the terminal's title.
    log += "\x1b[1;31mline 99997\x1b[0m\nline 1%\rline 5%\rline 99998\r\nline 99999 \x1b]0;title\x07\n"
    site.run.attempt(0).log(0).write_text(log)
    site.run.attempt(0).metrics.write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 10_000)))
    site.state("RUNNING")
    later(1.0, lambda: (write_json(site.run.attempt(0).result, DONE), site.state("COMPLETED")))
    assert main(["wait", "run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    last = [*(f"line {number}" for number in range(99_990, 99_999)), "line 99999 \\x1b]0;title\\x07"]
    assert [line for line in shown if line.startswith("line ")] == last
    assert [line for line in shown if line.startswith("step ")] == ["step 9999/9  loss 0.5"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
@pytest.mark.parametrize("as_json", [False, True])
def test_it_can_be_left(signum: signal.Signals, as_json: bool, site: Site, later: Later, capsys: Capture) -> None:
    site.run.path.rename("it's")
    site.state("RUNNING")
    later(0.5, lambda: os.kill(os.getpid(), signum))
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        assert main(["wait", "it's", *(["--json"] if as_json else [])]) == 130
    finally:
        for s, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(s, handler)
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        f"meshrun: interrupted by {signum.name}; job 12 keeps running; "
        "follow it: python submit.py wait 'it'\"'\"'s'; end it: python submit.py cancel 'it'\"'\"'s'"
    )
    if as_json:
        expected = {"status": "detached", "exit_code": 130, "run_dir": str(Path("it's").absolute()), "job_id": "12"}
        assert json.loads(out) == expected


def test_of_a_job_that_has_ended_nobody_says_that_it_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write_json(site.run.attempt(0).result, FAILED)
    site.state("FAILED", "NonZeroExitCode")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["wait", "run"]) == 130
    err = capsys.readouterr().err
    assert err == (
        "meshrun: stdout cannot be written (No space left on device); job 12 has ended; see its result with: "
        "python submit.py wait run\n"
    )
