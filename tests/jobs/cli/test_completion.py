"""What a real, interactive bash makes of <Tab>, and that the other shells get their code."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.run_dir import RunDirectory, write_json
from tests.jobs.submitting import SUBMIT

DEADLINE_S = 60


START = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        "bind 'set bell-style none'; eval \"$(python submit.py completion bash)\"; echo rea''dy\n",
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        "autoload -Uz compinit; compinit -u; eval \"$(python submit.py completion zsh)\"; echo rea''dy\n",
    ),
}
TAKE_BACK = "\x15"


class Shell:
    """An interactive shell on a terminal, in a directory with a run, a script and the completion."""

    def __init__(self, name: str, directory: Path) -> None:
        command, line = START[name]
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            os.environ |= {"PS1": "$ ", "TERM": "dumb"} | surroundings(directory)
            os.execvp(command[0], command)
        self.type(line, "ready")

    def type(self, text: str, until: str) -> str:
        """What the terminal shows up to `until`, after that text was typed."""
        os.write(self.terminal, text.encode())
        shown, end = "", time.monotonic() + DEADLINE_S
        while until not in shown:
            assert time.monotonic() < end, f"{text!r}: {until!r} does not come: {shown!r}"
            if select.select([self.terminal], [], [], 0.2)[0]:
                shown += os.read(self.terminal, 4096).decode()
        return shown

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


def surroundings(directory: Path) -> dict[str, str]:
    path = f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"XDG_STATE_HOME": str(directory), "HOME": str(directory), "PATH": path}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    run = RunDirectory(tmp_path / "runs" / "20260101-mine-77aa")
    run.path.mkdir(parents=True)
    write_json(run.job, {"workload": "tp_fsdp"})
    (tmp_path / "train.py").touch()
    (tmp_path / "submit.py").symlink_to(SUBMIT)
    (tmp_path / "meshrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SUBMIT}" "$@"\n')
    (tmp_path / "meshrun").chmod(0o755)
    return tmp_path


def needs(shell: str) -> None:
    if shutil.which(shell) is None and "CI" not in os.environ:
        pytest.skip(f"no {shell}")


COMPLETED = {
    "wai": "wait",
    "tp_fsdp model.di": "model.dim=",
    "tp_fsdp precision=b": "precision=bf16",
    "tp_fsdp --exec": "--executor",
    "tp_fsdp --cluster slu": "slurm",
    "wait 2026": "20260101-mine-77aa",
    "script tra": "train.py",
}


@pytest.mark.parametrize("shell", START)
def test_a_shell_completes_verbs_runs_settings_and_values(shell: str, directory: Path) -> None:
    needs(shell)
    own = Shell(shell, directory)
    try:
        for typed, shown in COMPLETED.items():
            command = "python submit.py" if shell == "bash" else "meshrun"
            own.type(f"{command} {typed}\t", shown)
            own.type(TAKE_BACK, "")
    finally:
        own.close()


def test_fish_completes_them_too(directory: Path) -> None:
    needs("fish")
    lines = "".join(f"complete -C 'meshrun {typed}'\n" for typed in COMPLETED)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"meshrun completion fish | source\n{lines}"],
        cwd=directory,
        env=os.environ | surroundings(directory),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [*COMPLETED.values()], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_code(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "submit.py" in code
    assert re.search(r"^#compdef|complete|compdef", code, re.MULTILINE)
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=code, text=True).returncode == 0
        assert not re.search(r"complete .* -D ", code)  # other commands' completion stays as it is


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bsh"]) == 2
    assert "completion bsh: no such shell (did you mean 'bash'?)" in capsys.readouterr().err
