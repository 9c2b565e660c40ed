"""A Slurm job as its user follows it: the queue, the progress, the end; leaving it and coming back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import check_harness
from tests.jobs.submitting import SUBMIT, Line, assert_ended_like_a_script, submit, wait_until
from tests.slurm.harness import Cluster
from tests.test_streams import close

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

SAMPLE = Path(__file__).parent.parent / "jobs" / "sample_workload.py"
TWO = ("--nodes", "2", "--gpus-per-node", "1")
LONG = ("steps=100000", "pause_seconds=0.05")
END_S = 90
"""Far more than any of these jobs takes; what must be quick is measured."""

Follow = Callable[..., Line]


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Follow]:
    """`follow(cluster, ...)` is a line with --wait, whose output goes to files that can be read while it runs."""
    lines: list[Line] = []

    def type_line(cluster: Cluster, *words: str, **popen: Any) -> Line:
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            popen = {"stdout": out, "stderr": err, "start_new_session": True, **popen}
            popen = {"env": cluster.env, **popen}
            lines.append(submit(tmp_path, "mine:ENTRY", "--wait", *TWO, *words, **popen))
        return lines[-1]

    yield type_line
    for line in lines:
        line.kill_everything()


def out(line: Line) -> str:
    return (line.directory / "out").read_text()


def err(line: Line) -> str:
    return (line.directory / "err").read_text()


def code(line: Line) -> int:
    return line.process.wait(END_S)


def come_back(cluster: Cluster, line: Line, *words: str) -> subprocess.CompletedProcess[str]:
    """`submit.py wait run`, to its end."""
    return subprocess.run(
        [sys.executable, SUBMIT, "wait", "run", *words],
        cwd=line.directory,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=END_S,
    )


def job_id(line: Line) -> str:
    path = line.run_dir / "submission.json"
    wait_until(path.exists, "a submission")
    return str(json.loads(path.read_text())["job_id"])


def says(line: Line, words: str) -> None:
    wait_until(lambda: words in out(line) or line.process.poll() is not None, f"'{words}'", END_S)
    assert words in out(line), out(line) + err(line)


def occupy(cluster: Cluster) -> str:
    """A job that has every host for itself."""
    sleep = cluster.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    return str(cluster.wait_job_state(sleep.strip(), "RUNNING") and sleep.strip())


@pytest.mark.parametrize("cluster", ["slurm", "slurm_accounting"])
def test_the_queue_then_progress_then_the_result(cluster: str, request: pytest.FixtureRequest, follow: Follow) -> None:
    slurm: Cluster = request.getfixturevalue(cluster)
    line = follow(slurm, "steps=4", "at_end=a script")
    assert code(line) == 0, err(line)
    shown = out(line)
    places = [shown.find(words) for words in ("submitted job ", ": RUNNING on node[0-1]", "step 4/4", "total: 12")]
    assert -1 not in places, shown
    assert places == sorted(places)
    assert err(line) == ""
    assert line.result()["result"]["hosts"] == ["node0", "node1"]
    assert slurm.job_state(job_id(line)) == "COMPLETED"
    assert_ended_like_a_script(line.directory, steps=4)
    # And again, when it is long over: from disk, without the progress.
    before = time.monotonic()
    again = come_back(slurm, line, "--json")
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert (record["status"], record["exit_code"], record["job_id"]) == ("done", 0, job_id(line))
    assert record["result"]["total"] == 12
    assert "step 4/4" not in again.stderr
    assert time.monotonic() - before < 60
    # Its number may be another job's some day.
    (line.run_dir / "attempt-0" / "result.json").unlink()
    path = line.run_dir / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "job_id": occupy(slurm)}))
    again = come_back(slurm, line)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.endswith("says how it ended (another job has this number now)\n")


def test_a_run_that_a_signal_stops_is_not_done(slurm: Cluster, follow: Follow) -> None:
    line = follow(slurm, "does=SIGUSR1", "steps=9")
    assert code(line) == 1, out(line)
    assert err(line) == "meshrun: error: the job was stopped: by request, after step 3 of 9\n"
    assert line.result()["status"] == "stopped"
    assert "the work is" not in out(line)
    slurm.wait_job_state(job_id(line), "FAILED")  # no job that depends on it starts


@pytest.mark.parametrize(
    ("does", "message", "traceback"),
    [
        ("raise", "ValueError: the third layer is missing", True),
        ("sys.exit", "called sys.exit(3) before its work was done", True),
        ("SIGKILL", "killed by SIGKILL", False),
    ],
)
def test_a_rank_that_dies_ends_the_job_and_is_named(
    does: str, message: str, traceback: bool, slurm: Cluster, follow: Follow, record_property: Any
) -> None:
    line = follow(slurm, f"does={does}")
    assert code(line) == 1, out(line)
    ended = time.time()
    last = err(line).splitlines()[-1]
    assert last.startswith(f"meshrun: error: the job failed: rank 1 on node1: {message}")
    assert last.endswith(f"(log: {line.run_dir}/attempt-0/rank-1.log)")
    assert ("Traceback" in err(line), 'mine.py", line' in err(line)) == (traceback, traceback)
    assert "onnection closed" not in err(line)
    record = line.result()
    assert (record["status"], record["failure"]["rank"], record["failure"]["host"]) == ("failed", 1, "node1")
    assert message in record["error"]
    assert f"attempt 0 failed: rank 1 on node1: {message}" in (line.run_dir / "slurm.log").read_text()
    # The step's end is written by rank 0 just before; of a rank that left no record that is the time it was last seen.
    died = (line.run_dir / "metrics.jsonl").stat().st_mtime
    record_property("seconds_from_death_to_exit", round(ended - died, 2))
    assert ended - died < 20
    assert slurm.job_state(job_id(line)) == "FAILED"
    # A run directory outlives Slurm's memory (MinJobAge); here its job's number is one of long ago.
    path = line.run_dir / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "job_id": "7"}))
    (line.run_dir / "attempt-0" / "result.json").unlink()
    again = come_back(slurm, line)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == last
    assert again.stdout == ""


def test_ctrl_c_while_sbatch_is_asked_leaves_no_job_unknown(slurm: Cluster, follow: Follow, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches sbatch too, which may have queued the job by then."""
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    sbatch = shutil.which("sbatch", path=slurm.env["PATH"])
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *test-only*|*version*) ;; *) touch {tmp_path}/asked; sleep 2;; esac\n{sbatch} "$@"\n'
    )
    slow.chmod(0o755)
    line = follow(slurm, "--sbatch", "hold", env={**slurm.env, "PATH": f"{slow.parent}:{slurm.env['PATH']}"})
    wait_until((tmp_path / "asked").exists, "sbatch")
    os.killpg(line.process.pid, signal.SIGINT)
    assert code(line) == 130
    assert f"job {job_id(line)} keeps running; follow it: python {SUBMIT} wait run" in err(line)
    assert slurm.job_state(job_id(line)) == "PENDING"


@pytest.mark.parametrize("words", [[], ["--wait"], ["--json"]], ids=str)
def test_a_job_whose_line_can_print_nothing_is_named_on_stderr(
    words: list[str], slurm: Cluster, typed: Callable[..., Line]
) -> None:
    with Path("/dev/full").open("w") as full:
        line = typed("mine:ENTRY", "--sbatch", "hold", *words, env=slurm.env, stdout=full)
    assert line.process.stderr is not None
    last = line.process.stderr.read().splitlines()[-1]
    job = job_id(line)
    assert code(line) == 130
    assert last == (
        f"meshrun: stdout cannot be written (No space left on device); job {job} keeps running; "
        f"follow it: python {SUBMIT} wait run; end it: python {SUBMIT} cancel run"
    )
    assert slurm.job_state(job) == "PENDING"


def test_a_job_whose_submission_was_not_answered_runs_and_can_be_followed(
    slurm: Cluster, follow: Follow, tmp_path: Path
) -> None:
    """The controller has queued it, and answers neither that nor where it is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    sbatch = shutil.which("sbatch", path=slurm.env["PATH"])
    lost = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    for name, text in {
        "sbatch": f'{sbatch} "$@" || exit\ncase "$*" in *test-only*) ;; *) {lost};; esac',
        "squeue": "exit 1",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    line = follow(slurm, env={**slurm.env, "PATH": f"{folder}:{slurm.env['PATH']}"})
    assert code(line) == 1
    assert "it is not known whether the job is queued" in err(line)
    assert job_id(line)  # the job itself has left it
    back = come_back(slurm, line)
    assert back.returncode == 0, back.stderr
    assert "total: 9" in back.stdout


def test_ctrl_c_while_it_waits_in_the_queue_leaves_it_there(slurm: Cluster, follow: Follow) -> None:
    blocker = occupy(slurm)
    line = follow(slurm)
    says(line, ": PENDING (Resources)")
    os.killpg(line.process.pid, signal.SIGINT)  # as a terminal does: to all that the line has started
    assert code(line) == 130
    job = job_id(line)
    assert err(line) == (
        f"meshrun: interrupted by SIGINT; job {job} keeps running; follow it: python {SUBMIT} wait run; "
        f"end it: python {SUBMIT} cancel run\n"
    )
    assert slurm.job_state(job) == "PENDING"
    slurm.run("scancel", blocker)
    back = come_back(slurm, line)
    assert back.returncode == 0, back.stderr
    assert "done in " in back.stdout  # its steps are shown only if it still runs by then
    assert "total: 9" in back.stdout


def test_a_terminal_that_is_closed_leaves_the_job_running(slurm: Cluster, follow: Follow) -> None:
    line = follow(slurm, *LONG, "--json")
    line.wait_for_step(2)
    os.killpg(line.process.pid, signal.SIGHUP)
    assert code(line) == 130
    record = json.loads(out(line))
    assert (record["status"], record["exit_code"], record["job_id"]) == ("detached", 130, job_id(line))
    assert err(line).splitlines()[-1].startswith("meshrun: interrupted by SIGHUP; job ")
    steps = len(line.metrics())
    line.wait_for_step(steps + 5)
    assert slurm.job_state(job_id(line)) == "RUNNING"


def test_a_job_that_is_cancelled_while_it_is_followed(slurm_accounting: Cluster, follow: Follow) -> None:
    line = follow(slurm_accounting, *LONG, preexec_fn=close(1))  # as `>&-` does
    line.wait_for_step(2)
    slurm_accounting.run("scancel", job_id(line))
    cancelled = time.monotonic()
    assert code(line) == 1
    assert time.monotonic() - cancelled < 20
    last = err(line).splitlines()[-1]
    assert f"meshrun: error: job {job_id(line)} was cancelled by {slurm_accounting.user}, after step " in last
    assert line.result()["status"] == "cancelled"
    assert line.result()["slurm_state"] == "CANCELLED"


def test_a_job_that_is_cancelled_in_the_queue(slurm: Cluster, follow: Follow) -> None:
    occupy(slurm)
    line = follow(slurm)
    says(line, ": PENDING (Resources)")
    slurm.run("scancel", job_id(line))
    assert code(line) == 1
    assert err(line).splitlines()[-1].endswith(f"job {job_id(line)} was cancelled before it started")


# --- what takes Slurm long: on clusters of their own, meanwhile -------------------------------------------------------

NO_USER_SIGNAL: dict[str, Any] = {
    "partitions": {
        "main": "Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=5",
        "high": "MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF",
    },
    "SlurmctldParameters": "cloud_dns",  # anything but preempt_send_user_signal
}


def preemption(cluster: Cluster, line: Line) -> None:
    line.wait_for_step(3)
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def controller(cluster: Cluster, line: Line) -> None:
    line.wait_for_step(2)
    cluster.wait_until_saved(job_id(line))
    cluster.kill_slurmctld()
    says(line, "Slurm does not answer (")
    cluster.start_slurmctld()


def cannot_leave(cluster: Cluster, line: Line) -> None:
    """The rank that fails keeps a thread; the other one sleeps instead of noticing."""


STORIES: dict[str, tuple[Callable[[Cluster, Line], None], dict[str, Any], list[str]]] = {
    "preemption": (preemption, NO_USER_SIGNAL, ["steps=400", "pause_seconds=0.1", "pause_again=false"]),
    "controller": (controller, {}, ["steps=400", "pause_seconds=0.05"]),
    "cannot leave": (cannot_leave, {}, ["does=echo first"]),
}


class Story(threading.Thread):
    """One of them, and how it ended."""

    def __init__(self, name: str, root: Path) -> None:
        super().__init__(daemon=True)
        self.act, self.tweaks, self.words = STORIES[name]
        self.root = root
        self.trouble: BaseException | None = None

    def run(self) -> None:
        try:
            directory = self.root / "work"
            directory.mkdir()
            text = SAMPLE.read_text()
            if self.act is cannot_leave:
                thread = "import threading; threading.Thread(target=time.sleep, args=(600,)).start()"
                text = text.replace('if what == "echo first":\n', f'if what == "echo first":\n        {thread}\n')
                text = text.replace('raise RuntimeError("Connection closed', 'time.sleep(600)  # ("Connection closed')
            (directory / "mine.py").write_text(text)
            with (
                Cluster(self.root / "s", gpus=1, **self.tweaks) as cluster,
                (directory / "out").open("w") as out,
                (directory / "err").open("w") as err,
            ):
                words = ("mine:ENTRY", "--wait", *TWO, *self.words)
                self.line = submit(directory, *words, env=cluster.env, stdout=out, stderr=err)
                try:
                    self.act(cluster, self.line)
                    self.code = code(self.line)
                    self.ended = time.time()
                finally:
                    self.line.kill_everything()
        except BaseException as trouble:
            self.trouble = trouble

    def end(self) -> Line:
        self.join()
        if self.trouble is not None:
            raise self.trouble
        return self.line


@pytest.fixture(scope="module", autouse=True)
def stories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    """They begin with the first test of this file, where any of theirs is to run."""
    theirs = {test.__name__ for test in TESTS_OF_STORIES}
    if not any(getattr(item, "originalname", "") in theirs for item in request.session.items):
        return {}
    check_harness(request)
    told = {name: Story(name, tmp_path_factory.mktemp("f")) for name in STORIES}
    for story in told.values():
        story.start()
    return told


def test_a_rank_that_failed_and_cannot_leave_does_not_keep_the_others(stories: dict[str, Story]) -> None:
    """Nor does it matter what those are busy with: none of them has to notice."""
    story = stories["cannot leave"]
    line = story.end()
    assert story.code == 1
    assert "the job failed: rank 1 on node1: ValueError: the third layer is missing" in err(line).splitlines()[-1]
    assert story.ended - line.result()["failure"]["when"] < 30


def test_a_controller_that_restarts_is_waited_for(stories: dict[str, Story]) -> None:
    story = stories["controller"]
    line = story.end()
    assert story.code == 0, err(line)
    assert out(line).count("Slurm does not answer") == 1
    assert "total: 1200" in out(line)


def test_a_preemption_with_a_grace_time_is_no_failure(stories: dict[str, Story]) -> None:
    """Where Slurm sends SIGTERM as the grace time begins, the ranks save; the job is to be there at its end."""
    story = stories["preemption"]
    line = story.end()
    shown = out(line)
    assert story.code == 0, shown + err(line)
    words = "preempted; waiting for Slurm to requeue the job"
    assert words in (line.run_dir / "slurm.log").read_text()
    # A job that Slurm starts again is followed to its real end.
    goes_on = "of 400; attempt 1 goes on"
    places = [shown.find(words) for words in (": PENDING (BeginTime)", goes_on, "step 400/400", "total: 1200")]
    assert -1 not in places, shown
    assert places == sorted(places)
    assert (line.result()["status"], line.result()["attempt"]) == ("done", 1)


TESTS_OF_STORIES = (
    test_a_rank_that_failed_and_cannot_leave_does_not_keep_the_others,
    test_a_controller_that_restarts_is_waited_for,
    test_a_preemption_with_a_grace_time_is_no_failure,
)
