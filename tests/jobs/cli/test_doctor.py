"""`submit.py doctor`: what is typed and what is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.verbs.doctor import lines_of
from jobs.doctor.judge import Verdict
from tests.jobs.submitting import SUBMIT

PLAIN = """\
executor local (--executor), cluster config CONFIG
ok    run directory   can be written here, N
ok    hosts           N host answered: HOST
ok    software        Python N, torch N, as here
ok    run directory   the host sees it
ok    disk            run directory: write N, read N
ok    CPU             N ranks on CPU: N in a matrix product
ok    links           N pair of N hosts, all on this machine: N each way
ok    all-reduce      N over N ranks in N: N per rank
fit: nothing failed in N checks
all measurements: RUN/doctor
"""


@pytest.mark.dist
def test_this_machine(tmp_path: Path) -> None:
    run, words = tmp_path / "run", ["doctor", "--executor", "local", "--nodes", "2"]
    done = subprocess.run(
        [sys.executable, SUBMIT, *words, "--run-dir", str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    text = re.sub(r"\n {22}", " ", done.stdout).replace(str(run), "RUN")
    text = re.sub(r"(?<=cluster config ).*", "CONFIG", re.sub(r"(?<=answered: ).*", "HOST", text))
    text = re.sub(r"\d[\d.+a-z]*( to \d[\d.]*)?( [kMGT]?(B/s|FLOP/s|B|s|ms)\b)?", "N", text.replace("all-reduce", "@"))
    text = re.sub(r"N to N|N [kMGT](B|FLOP)/s to N", "N", text).replace("@", "all-reduce")
    assert text == PLAIN
    measured = json.loads((run / "doctor/measured.json").read_text())
    assert [rank["host"] for rank in measured["ranks"]] == ["host0", "host1"]
    assert {*json.loads((run / "result.json").read_text())["result"]} == {"ranks", "links", "all_reduce"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--executor", "debug"], "--executor debug: a doctor looks at hosts, and this has none; use slurm or local"),
        (["--executor", "local", "--nodes", "0"], "--nodes 0"),
        (["--cluster", "locl"], "--cluster locl: no such cluster (did you mean 'local'?)"),
        (["--executor", "local", "--partition", "gpu"], "--partition gpu: applies to Slurm only"),
        (["steps=3"], "doctor takes no argument and got 1; write submit.py doctor [options]"),
        (["--dry-run"], "--dry-run: is a flag of submit.py WORKLOAD"),
    ],
    ids=str,
)
def test_wrong_input(words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"meshrun: error: {says}")
    assert err.count("\n") == 1


def test_a_verdict_fits_the_terminal_and_keeps_its_paths() -> None:
    text = "node2 has not answered: error: execve(): /project/me/" + "environment/" * 8 + "bin/python: No such file"
    verdict = Verdict("FAIL", "hosts", text, "does it see this Python? try srun --nodelist=node2 hostname")
    assert lines_of(verdict, 80) == [
        "FAIL  hosts           node2 has not answered: error: execve():",
        " " * 22 + "/project/me/" + "environment/" * 8 + "bin/python:",
        " " * 22 + "No such file",
        " " * 22 + "-> does it see this Python? try srun --nodelist=node2",
        " " * 22 + "hostname",
    ]
    assert lines_of(Verdict("ok", "clocks", "hosts agree " * 6), 80)[0] == (
        "ok    clocks          hosts agree hosts agree hosts agree hosts agree hosts"
    )
    assert len(lines_of(Verdict("ok", "clocks", "hosts agree " * 6), 200)) == 1
