"""A script finds itself as Python would have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.submitting import ROOT

SHOW = """
import json, os, sys
import beside
print(json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0], "name": __name__, "file": __file__,
    "package": __package__, "spec": __spec__ and __spec__.name, "doc": __doc__, "beside": beside.__name__,
    "main": sys.modules["__main__"].__file__, "loader": type(__loader__).__name__,
}, sort_keys=True))
class Thing: pass
import pickle
assert isinstance(pickle.loads(pickle.dumps(Thing())), Thing)
"""
BY_US = """
import sys
from pathlib import Path
from workloads.script.config import of_line
from workloads.script.main import run
run(of_line(sys.argv[1:], Path.cwd()))
"""


@pytest.mark.parametrize("line", [["sub/show.py", "--lr", "3"], ["./link.py"], ["-m", "sub.module", "a.b=c"]])
def test_a_script_sees_what_python_shows_it(line: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    for name in ("__init__.py", "beside.py"):
        (folder / name).touch()
    (folder / "show.py").write_text(SHOW)
    (folder / "module.py").write_text(SHOW.replace("import beside", "from . import beside"))
    (tmp_path / "link.py").symlink_to(folder / "show.py")

    def shown(*start: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *start, *line]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert shown("-c", BY_US) == shown()


def test_a_users_package_may_have_the_name_of_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/__init__.py").write_text("value = 7")
    (tmp_path / "train.py").write_text("import jobs\nprint(jobs.value)")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import jobs, jobs.spec\n{BY_US}", "train.py"]
    assert subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout == "7\n"
