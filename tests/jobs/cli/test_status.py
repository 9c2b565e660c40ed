"""`submit.py status`: what is shown of no run, one and several, and which lines are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.cli.main import main
from tests.jobs.runs.some_runs import a_run
from tests.jobs.submitting import SUBMIT
from tests.test_submit import Bad, check_refusal, name, tree

ROWS = [{"step": step, "loss": 2.5, "tokens_per_second": 4000.0, "step_seconds": 0.5} for step in range(1, 8)]
RUN = {"run/job.json": "{}"}
BAD = [
    Bad(["status", "gone"], ["'gone': no such run, here or in ./runs"]),
    Bad(["status", "--limit", "x"], ["--limit x: is not a number of runs from 1 on; write --limit 100"]),
    Bad(["status", "-n", "0"], ["--limit 0: is not a number of runs from 1 on"]),
    Bad(["status", "-n", "1", "--limit", "2"], ["is given twice"]),
    Bad(["status", "--watch=2"], ["--watch"]),
    Bad(["status", "run", "--nodes", "2"], ["--nodes: is a flag of", "not of submit.py status"], RUN),
    Bad(["cancel"], ["cancel: give the runs to end, or --all for all of yours; see submit.py status"]),
    Bad(["cancel", "run", "--all"], ["cancel: give either runs or --all"], RUN),
    Bad(["cancel", "--all"], ["cancel --all: stdin is not a terminal to ask at, so nothing was done; add --yes"]),
    Bad(["cancel", "run", "gone"], ["'gone': no such run"], RUN),
    Bad(["clean"], ["clean: nothing says which runs go; give --older-than, --larger-than, --state"]),
    Bad(["clean", "--yes"], ["clean: nothing says which runs go"]),
    Bad(
        ["clean", "--older-than", "30"],
        ["--older-than 30: is not an age; write a number and m, h, d or w, such as 30d"],
    ),
    Bad(["clean", "--larger-than", "big"], ["--larger-than big: is not a size; write a number and K, M, G or T"]),
    Bad(["clean", "--state", "faild"], ["--state faild: is not a state in which runs end", "did you mean 'failed'?"]),
    Bad(["clean", "--state", "running"], ["clean removes only runs that are known to have ended"]),
    Bad(["clean", "gone"], ["'gone': no such run"]),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory without any run, and no Slurm."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(tmp_path / "no Slurm here"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["submit.py"])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("bad", BAD, ids=name)
def test_a_mistake_is_one_line_and_changes_nothing(bad: Bad, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.prepare(here)
    before = tree(here)
    code = main(bad.line)
    out, err = capsys.readouterr()
    check_refusal(bad, code, out, err, before, here)


def test_no_run_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out == f"no run yet, neither in ./runs nor in {tmp_path}/state/meshrun/runs\n"
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": [], "not_shown": 0}
    assert main(["status", "--watch", "--json"]) == 2
    assert "leave one of the two out" in json.loads(capsys.readouterr().out)["error"]


def test_the_newest_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        run = a_run(here / "runs" / f"run-{number:02}", record={"status": "done", "seconds": 65.0}, rows=ROWS)
        os.utime(run.job, (number, number))
    before = tree(here)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert lines[0] == "RUN     STATE      JOB  WORKLOAD  SHAPE    STEP  LOSS            RATE  TOOK"
    assert lines[1] == "run-24  COMPLETED  12   tp_fsdp   2x4    7/2000   2.5  4,000 tokens/s  1:05"
    assert lines[-1] == "5 older runs are not shown; see them with --limit"
    assert main(["status", "-n", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["not_shown"] == 24
    assert [(run["name"], run["state"], run["is_alive"], run["loss"]) for run in shown["runs"]] == [
        ("run-24", "COMPLETED", False, 2.5)
    ]
    assert main(["status", "run-03", "run-01"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["RUN", "run-03", "run-01"]
    assert tree(here) == before


ONE = """\
run       {here}/runs/one
state     FAILED
reason    rank 1 on n1: ValueError: the third layer is missing, and what follows
          is too long for one line of this terminal (log: /logs/rank-1.log)
workload  tp_fsdp
shape     2 hosts x 4 = 8 ranks
job       12 of Slurm, submitted 2026-11-22 08:15:30 UTC from login
progress  step 7 of 2000, 0.5 s per step
metrics   loss 2.5, 4,000 tokens/s
took      1:05
restarts  2
logs      {here}/runs/one/attempt-2
go on     python submit.py resume runs/one
"""


def test_one_run_in_detail(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = (
        "rank 1 on n1: ValueError: the third layer is missing, and what follows is too long for one line of this "
        "terminal (log: /logs/rank-1.log)"
    )
    record = {"status": "failed", "error": error, "failure": {"rank": 1}, "seconds": 65.0}
    run = a_run(here / "runs" / "one", host="login", record=record, rows=ROWS, attempt=2)
    (run.checkpoints / "step-5").mkdir(parents=True)
    assert main(["status", "one"]) == 0
    assert capsys.readouterr().out == ONE.format(here=here)


def test_a_run_that_nobody_knows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(here / "runs" / "one")
    assert main(["status", "last"]) == 0
    shown = capsys.readouterr().out
    assert "state     UNKNOWN\nreason    Slurm does not answer: squeue: No such file or directory\n" in shown


def test_names_from_the_disk_control_no_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = "\x1b[31mred\nand a line"
    a_run(here / "runs" / "a\x1b[2Jb", record={"status": "failed", "error": error}, workload="\x1b]0;x", rows=ROWS)
    for words in (["status"], ["status", "last"]):
        assert main(words) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_watching_ends_with_the_run_or_leaves_it_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(here / "runs" / "one", record={"status": "done"})
    assert main(["status", "one", "--watch"]) == 0
    assert "(Ctrl-C ends this view; the runs go on)\nrun       " in capsys.readouterr().out
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert main(["status", "--watch"]) == 130
    out, err = capsys.readouterr()
    assert "one  COMPLETED" in out
    assert err == "meshrun: interrupted by SIGINT; the runs are left alone\n"


def test_in_a_plain_locale_and_without_torch(here: Path) -> None:
    a_run(here / "runs" / "ünïcode", record={"status": "failed", "error": "naïve – ✗"})
    env = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "120"}
    code = (
        "import sys\nfor name in ('torch', 'numpy', 'yaml.x'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(Path(SUBMIT).parent)!r}); sys.argv[1:] = ['status']\n"
        "import submit; sys.exit(submit.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FAILED" in done.stdout


def test_removing_what_was_listed(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = a_run(here / "runs" / "old", record={"status": "failed", "error": "rank 1: ValueError: mine"})
    kept = a_run(here / "runs" / "kept", record={"status": "done"})
    alive = a_run(here / "runs" / "alive")
    assert main(["clean", "--state", "failed"]) == 2  # stdin is no terminal
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:4] == ["RUN", "STATE", "AGE", "SIZE"]
    assert "would remove 1 run directory, " in err
    assert old.path.exists()
    assert main(["clean", "--state", "failed", "--older-than", "30d", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("removed 1 of 1, which freed ")
    assert (old.path.exists(), kept.path.exists(), alive.path.exists()) == (False, True, True)
    assert str(old.path) not in (tmp_path / "state" / "meshrun" / "runs").read_text().splitlines()
    assert main(["clean", "alive", "--yes"]) == 0
    assert capsys.readouterr().out == (
        "alive: is kept, because it is not known to have ended: Slurm does not answer: squeue: No such file or "
        "directory\nno run to remove: of 1, none has ended and fits\n"
    )
    assert main(["clean", "--older-than", "30d", "--yes", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [(run["run_dir"], run["error"]) for run in record["runs"]] == [(str(kept.path), "")]
    assert record["bytes"] == record["runs"][0]["bytes"] > 0
    assert not kept.path.exists()


@pytest.mark.parametrize(("answer", "is_gone"), [("y\n", True), ("n\n", False), ("", False), ("yes\n", True)])
def test_an_answer(
    answer: str, is_gone: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_end, write_end = os.openpty()
    run = a_run(here / "runs" / "old", record={"status": "done"})
    with os.fdopen(write_end, "r", closefd=True) as terminal:
        os.write(read_end, (answer or "\4").encode())  # Ctrl-D
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["clean", "old"]) == 0
    os.close(read_end)
    assert run.path.exists() != is_gone
    out, err = capsys.readouterr()
    assert err.startswith("Remove 1 run directory, ")
    assert err.endswith("? [y/N] ")
    assert out.splitlines()[-1].startswith("removed 1 of 1" if is_gone else "nothing was removed")


def test_cancelling_what_has_ended(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(here / "runs" / "done", record={"status": "done"})
    a_run(here / "runs" / "unknown")
    assert main(["cancel", "done"]) == 0
    assert capsys.readouterr().out == "done: has ended already: COMPLETED\n"
    assert main(["cancel", "done", "unknown", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [run["action"] for run in json.loads(out)["runs"]] == ["ended", "failed"]
    assert "meshrun: error: unknown: nothing was done: Slurm does not answer: " in err
    # All of mine: it is not known whether one of them is left.
    assert main(["cancel", "--all", "--yes"]) == 1
    out, err = capsys.readouterr()
    assert out == "none of your runs is known to be running or waiting\n"
    assert "it is not known whether unknown runs" in err
