"""Sweeps on this machine: the queue, its table, what is shown before; and `--after`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import after, sweep_queue, sweep_table
from jobs.cli.console import Console
from jobs.cli.main import main
from jobs.cli.options import parse
from jobs.cli.resolve import resolve
from jobs.errors import CommandLineError, ResourceError
from jobs.run_dir import RunDirectory
from jobs.runs import sweep
from jobs.runs.overview import overviews
from tests.jobs.cli import sweeping
from tests.jobs.runs.some_runs import a_run
from tests.jobs.submitting import SUBMIT, wait_until
from tests.test_submit import tree

DONE = {"status": "done", "seconds": 2.0}
FAILED = {"status": "failed", "error": "out of luck"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["submit.py"])
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(str(sweeping.__file__), folder / "mine.py")
    monkeypatch.chdir(folder)
    return folder


def typed(here: Path, *words: str, **popen: Any) -> subprocess.Popen[str]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, SUBMIT, *words], cwd=here, text=True, **{**streams, **popen})


TABLE = """\
sweep {here}/sweep
RUN  STATE      lr  seed  HELD-OUT  STEP    LOSS
0 *  COMPLETED  1   1            1   3/3  0.3333
1    COMPLETED  1   2            2   3/3  0.6667
2    COMPLETED  2   1            2   3/3  0.6667
3    FAILED     2   2                1/3       4
    rank 0 on host0: ValueError: it diverged (m...
* the lowest heldout_loss, 1: sweep/0 (lr=1 seed=1)
compare them: python submit.py compare sweep -o compare.html
"""


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_a_failed_point_stops_no_other_and_is_submitted_again_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mine:ENTRY", "--executor", "local", "--gpus-per-node", "2", "lr=1,2", "seed=1..2", "fails=2 2"]
    line = typed(here, *words, "--parallel", "2", "--run-dir", "sweep", env={**os.environ, "COLUMNS": "50"})
    out, err = line.communicate(timeout=150)
    assert line.returncode == 1, err
    said, _, end = out.partition("sweep /")
    end = re.sub(r"python \S+submit.py", "python submit.py", f"sweep /{end}")
    assert end == TABLE.replace("{here}", str(here))
    assert re.search(r"1 of 4 points are not done; go on with one: python \S+ resume sweep/3; start it anew: ", err)
    assert f"sweep of 4 points, 2 at once: {here}/sweep\n" in said
    assert "point 0 (lr=1 seed=1): started\npoint 1 (lr=1 seed=2): started\n" in said
    assert len(re.findall(r"^point [0-2] \(lr=. seed=.\): done in [\d.]+ s$", said, re.MULTILINE)) == 3
    failure = "the job failed: rank 0 on host0: ValueError: it diverged (mine.py:"
    assert f"point 3 (lr=2 seed=2): {failure}" in said
    jobs = [json.loads((here / "sweep" / name / "job.json").read_text()) for name in "0123"]
    assert [job["cpu_binding"] for job in jobs] == ["none"] * 4  # else both points would be on the first CPUs
    # Of the code there is one copy, which each point runs.
    assert [(here / "sweep" / name / "code").resolve() for name in "0123"] == [here / "sweep" / "code"] * 4
    assert "sweep/3/code/here/mine.py" in (here / "sweep/3/attempt-0/rank-0.log").read_text()

    (here / "mine.py").write_text("raise SystemExit('changed since')")
    assert main(["resubmit", "sweep/3", "--env", "WHY=again"]) == 1
    assert RunDirectory(here / "sweep" / "3.1").recorded() is not None
    capsys.readouterr()
    assert main(["status", "sweep"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:6]] == ["0", "1", "2", "3.1"]
    assert main(["compare", "sweep"]) == 0
    heads, *rows = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", heads.strip())[2:] == ["2: lr=2 seed=1", "3.1: lr=2 seed=2"]
    assert ["seed", "1", "2", "1", "2"] in [row.split() for row in rows]
    assert main(["explain", "sweep/3"]) == 0
    assert capsys.readouterr().out.startswith("sweep/3: failed by an exception\n")
    assert main(["wait", "sweep"]) == 1
    assert "1 of 4 points are not done" in capsys.readouterr().err
    assert main(["clean", "--yes", "sweep/0"]) == 0
    assert (here / "sweep" / "code").exists()
    assert main(["clean", "--yes", "sweep"]) == 0
    assert not (here / "sweep").exists()


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_point_is_cancelled_before_its_turn_and_ctrl_c_ends_the_rest(here: Path) -> None:
    words = ["mine:ENTRY", "--executor", "local", "seed=1..4", "steps=9", "waits_for=never"]
    line = typed(here, *words, "--run-dir", "sweep")
    try:
        wait_until(lambda: (here / "sweep/0/metrics.jsonl").exists(), "point 0 takes a step")
        runs = [RunDirectory(here / "sweep" / name) for name in "0123"]
        assert [(one.state, one.is_alive) for one in overviews(runs)] == [("RUNNING", True), *[("PENDING", True)] * 3]
        assert main(["cancel", "sweep/1", "sweep/0"]) == 0
        wait_until(lambda: (here / "sweep/2/metrics.jsonl").exists(), "point 2 takes a step")
        line.send_signal(signal.SIGINT)
        out, err = line.communicate(timeout=60)
    finally:
        line.kill()
        line.wait()
    assert line.returncode == 130
    assert "interrupted by SIGINT; points that were ended: 1, that had not begun: 1; none of their proc" in err
    assert "point 1 (seed=2): was cancelled before its turn" in out
    states = [(one.state, one.is_alive) for one in overviews(runs)]
    assert states == [("STOPPED", False), *[("CANCELLED", False)] * 3]
    assert not runs[1].submitted()


def test_a_queue_that_was_killed_leaves_no_point_that_waits(here: Path) -> None:
    for name in "01":
        a_run(here / "sweep" / name, job_id="", executor="local")
    made = sweep.write(here / "sweep", [{"seed": "1"}, {"seed": "2"}])
    with sweep.queue_runs(made):
        assert [(one.state, one.reason) for one in overviews(made.runs())] == [("PENDING", "waits for its turn")] * 2
    seen = overviews(made.runs())
    assert [(one.state, one.is_alive) for one in seen] == [("CANCELLED", False)] * 2
    assert seen[0].reason == "its sweep has ended without starting it"


def test_a_dry_run_shows_the_points_and_the_array_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    line = ["tp_fsdp", "--executor", "slurm", "--dry-run", "--run-dir", "sweep", "lr=1e-3,3e-4", "seed=1..2"]
    assert main([*line, "--parallel", "3"]) == 0
    out = capsys.readouterr().out
    points = "  0: lr=1e-3 seed=1\n  1: lr=1e-3 seed=2\n  2: lr=3e-4 seed=1\n  3: lr=3e-4 seed=2\n"
    assert f"sweep of 4 points: {here}/sweep\n{points}\nsettings of point 0:\n" in out
    assert "\n  #SBATCH --array=0-3%3\n" in out
    assert f"\n  #SBATCH --output={here}/sweep/%a/slurm.log\n" in out
    for parallel in ([], ["--parallel", "4"], ["--parallel", "9"]):
        assert main([*line, *parallel, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["submission"]["parameters"]["sbatch"]["array"] == "0-3"
        assert shown["points"][3] == {"lr": "3e-4", "seed": "2"}
    assert tree(here) == before


PREPARES = """
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError

class Config(WorkloadConfig):
    size: int = 1

def prepare(config, directory):
    if config.size == 3:
        raise WorkloadError("no corpus of that size")

ENTRY = WorkloadEntry(name="mine", config=Config, run=lambda config, ctx: {}, prepare=prepare)
"""


def test_where_a_point_cannot_be_prepared_nothing_is_left(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "prepares.py").write_text(PREPARES)
    before = tree(here)
    assert main(["prepares:ENTRY", "--executor", "local", "size=2,3", "--run-dir", "a/sweep"]) == 2
    assert capsys.readouterr().err == "meshrun: error: no corpus of that size\n"
    assert {path: text for path, text in tree(here).items() if "__pycache__" not in str(path)} == before


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([{"heldout_loss": 2.0, "final_loss": 1.0}, {"heldout_loss": 1.5, "final_loss": 9.0}], "heldout_loss, 1.5: "),
        ([{"heldout_loss": 2.0, "final_loss": 1.0}, {"final_loss": 9.0}], "final_loss, 1: "),
        ([{"heldout_loss": "nan", "final_loss": 1.0}, {"heldout_loss": 1.0, "final_loss": 0.5}], "final_loss, 0.5: "),
        ([{"accuracy": 1.0}, {"accuracy": 2.0}], ""),
        ([{"heldout_loss": 2.0}, None], ""),
    ],
)
def test_the_best_point(here: Path, results: list[dict[str, Any] | None], expected: str) -> None:
    for number, result in enumerate(results):
        record = FAILED if result is None else {**DONE, "result": result}
        a_run(here / "sweep" / str(number), record=record, executor="local")
    made = sweep.write(here / "sweep", [{"seed": "1"}, {"seed": "2"}])
    *_, last = sweep_table.lines(made, overviews(made.runs()))
    assert last.startswith(f"* the lowest {expected}" if expected else "1 ") or last.startswith("    out of luck")


def test_points_that_run_at_the_same_time_have_gpus_of_their_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["mine:ENTRY", "--executor", "local", "--gpus-per-node", "2"]
    jobs = [resolve(parse([*line, f"seed={number}", "--run-dir", f"s/{number}"])[1]) for number in range(4)]
    assert sweep_queue.seats(jobs, 1, 8) == [{}]
    assert sweep_queue.seats(jobs, 2, 0) == [{}, {}]
    seats = sweep_queue.seats(jobs, 3, 6)
    assert [seat["CUDA_VISIBLE_DEVICES"] for seat in seats] == ["0,1", "2,3", "4,5"]
    with pytest.raises(CommandLineError, match="--parallel 3: needs 6 GPUs, and 5 are visible here; --parallel 2 fits"):
        sweep_queue.seats(jobs, 3, 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    seats = sweep_queue.seats(jobs, 2, 4)
    assert [seat["CUDA_VISIBLE_DEVICES"] for seat in seats] == ["7,5", "3,1"]
    monkeypatch.setenv("MESHRUN_DEVICE", "cpu")
    assert sweep_queue.seats(jobs, 4, 4) == [{}] * 4
    jobs *= 100_000  # 150 MB for each rank that does nothing but import torch
    with pytest.raises(ResourceError, match=r"x mine:ENTRY needs about .* GiB for \d+ ranks on the CPU"):
        sweep_queue.seats(jobs, 5_000, 0)


# --- --after ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def local_run(here: Path) -> Any:
    """A local run whose agent is a process that waits for the end of its input."""
    run = here / "runs" / "before"
    words = [sys.executable, "-c", "input()", str(run)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    a_run(run, job_id=str(process.pid), executor="local")
    yield RunDirectory(run), process
    process.kill()
    process.communicate()


def test_what_a_job_comes_after(here: Path, local_run: tuple[RunDirectory, Any]) -> None:
    a_run(here / "runs" / "done", record=DONE, executor="local", job_id="1")
    a_run(here / "runs" / "lost", record=FAILED, executor="local", job_id="1")
    for number, record in enumerate((DONE, FAILED)):
        a_run(here / "sweep" / str(number), record=record, executor="local", job_id="1")
    sweep.write(here / "sweep", [{"seed": "1"}, {"seed": "2"}])
    assert after.of_line([], "slurm") == after.After()
    assert after.of_line(["done", "sweep/0"], "slurm") == after.After((), (), ("--after: done already",))
    run, _ = local_run
    waits = after.of_line(["done", "before"], "local")
    assert waits == after.After((str(run.path),), (), ("starts when before is done (--after)",))
    for name, executor, said in (
        ("lost", "slurm", r"--after: lost has ended and is not done \(FAILED\).*submit.py explain runs/lost"),
        ("sweep", "local", r"--after: sweep/1 has ended and is not done \(FAILED\)"),
        ("before", "slurm", "--after: before is no Slurm job, and none can wait for it"),
        ("gone", "slurm", "'gone': no such run"),
    ):
        with pytest.raises(CommandLineError, match=said):
            after.of_line([name], executor)
    assert main(["tp_fsdp", "--executor", "local", "--after", "before", "--no-wait"]) == 2


@pytest.mark.parametrize("record", [DONE, FAILED], ids=["done", "failed"])
def test_a_local_job_waits_for_the_end_of_another(
    record: dict[str, Any], local_run: tuple[RunDirectory, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, process = local_run
    shown: list[str] = []

    def wait() -> None:
        try:
            after.wait([str(run.path)], Console(as_json=False))
        except CommandLineError as error:
            shown.append(str(error))
        shown.append("ended")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    wait_until(lambda: capsys.readouterr().out == "waiting for before (RUNNING); Ctrl-C ends the wait\n", "a line")
    assert shown == []
    run.publish({"workload": "mine", "attempt": 0, **record})
    process.communicate(b"\n")
    thread.join(30)
    if record == DONE:
        assert shown == ["ended"]
    else:
        assert re.match(r"--after: before has ended and is not done \(FAILED\), so nothing starts; why: ", shown[0])


def test_a_failed_run_is_no_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(here / "runs" / "lost", record=FAILED, executor="local", job_id="1")
    for more in ([], ["seed=1,2"]):
        assert main(["mine:ENTRY", "--executor", "local", "--after", "lost", *more, "--run-dir", "new"]) == 2
        assert "lost has ended and is not done (FAILED), so nothing starts" in capsys.readouterr().err
    words = ["mine:ENTRY", "--executor", "slurm", "--sbatch", "dependency=singleton", "--after", "done", "--dry-run"]
    a_run(here / "runs" / "done", record=DONE, executor="local", job_id="1")
    assert main(words) == 0
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["mine.py", "runs"]
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["done", "lost"]
