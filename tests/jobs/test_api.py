"""Runs from Python, in a program of a user's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import api

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, logging, sys
import jobs
from jobs.errors import JobFailed, SettingsError

assert not {"jobs.cli", "torch", "pydantic"} & set(sys.modules), "importing jobs is light"
said = {}
try:
    jobs.submit("mine:ENTRY", executor="local", stesp=3)
except SettingsError as error:
    said["mistake"] = str(error)
run = jobs.submit("mine:ENTRY", executor="local", gpus_per_node=2, env={"A": "b"}, steps=3)
said["first"] = run.wait()["status"]
said["steps"] = [row["step"] for row in run.metrics()] if isinstance(run.metrics(), list) else list(run.metrics().step)
said["logs"] = "rank 1/2" in run.logs(rank=1), run.logs(last=1).count("\\n"), "rank 1 | " in run.logs(rank=None)
said["found"] = jobs.find() == run == jobs.find(run.job_id) == jobs.list_runs()[0]
failed = jobs.submit("mine:ENTRY", executor="local", steps=3, does="raise", on_rank=0)
try:
    failed.wait()
except JobFailed as error:
    said["failed"] = str(error)
said["cause"] = failed.explain().kind, failed.explain().rank
said["record"] = failed.wait(check=False)["status"]
slow = jobs.submit("mine:ENTRY", executor="local", steps=1, pause_seconds=60)
try:
    slow.wait(timeout_s=0.5)
except TimeoutError as error:
    said["slow"] = str(error)
said["states"] = run.status().state, slow.status().state, slow.cancel() and slow.status().state
script = jobs.submit("script", script=["train.py", "--lr", "3"], executor="local")
said["script"] = script.wait()["status"], script.logs()
print(json.dumps(said))
"""


def test_runs_are_submitted_awaited_and_read(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("sample_workload.py"), tmp_path / "mine.py")
    (tmp_path / "train.py").write_text("import sys\nprint(sys.argv[1:])\n")
    (tmp_path / "program.py").write_text(f"import sys\nsys.path.append({str(ROOT)!r})\n{PROGRAM}")
    env = {"XDG_STATE_HOME": str(tmp_path / "state"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    line = [sys.executable, "program.py"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # nothing else is printed
    assert said["mistake"].startswith("unknown setting 'stesp' (did you mean 'steps'?)")
    assert said["first"] == "done"
    assert said["steps"] == [1, 2, 3]
    assert said["logs"] == [True, 1, True]
    assert said["found"]
    assert "rank 0 on host0" in said["failed"]
    assert said["cause"] == ["exception", 0]
    assert said["record"] == "failed"
    assert "has not ended within 0.5 s; it goes on" in said["slow"]
    assert said["states"] == ["COMPLETED", "RUNNING", "CANCELLED"]
    assert said["script"] == ["done", "['--lr', '3']\n"]


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("nodes", 2, "2"),
        ("env", {"A": "b"}, ["A=b"]),
        ("sbatch", {"exclusive": True, "comment": "x"}, ["exclusive", "comment=x"]),
        ("allow_cpu", True, True),
        ("after", api.Run(Path("/runs/a")), ["/runs/a"]),
        ("after", ["12_3", api.Run(Path("/runs/a"))], ["12_3", "/runs/a"]),
        ("after", "last", ["last"]),
    ],
)
def test_flags_are_those_of_the_command_line(name: str, value: object, flag: object) -> None:
    assert api._flag(name, value) == flag
