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


class Bash:
    """An interactive bash on a terminal, in a directory with a run, a script and the completion."""

    def __init__(self, directory: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            os.environ |= {"PS1": "$ ", "TERM": "dumb", "XDG_STATE_HOME": str(directory), "HOME": str(directory)}
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self.type(f"PATH={Path(sys.executable).parent}:$PATH; bind 'set bell-style none'\n", "$ ")
        self.type('eval "$(python submit.py completion bash)"; echo rea""dy\n', "ready")

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


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_verbs_runs_settings_and_values(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "20260101-mine-77aa")
    run.path.mkdir(parents=True)
    write_json(run.job, {"workload": "tp_fsdp"})
    (tmp_path / "train.py").touch()
    (tmp_path / "submit.py").symlink_to(SUBMIT)
    bash = Bash(tmp_path)
    try:
        for typed, shown in (
            ("wai", "wait "),
            ("tp_fsdp model.di", "model.dim="),
            ("tp_fsdp precision=b", "precision=bf16 "),
            ("tp_fsdp --exec", "--executor "),
            ("tp_fsdp --cluster slu", "slurm "),
            ("wait 2026", "20260101-mine-77aa "),
            ("script tra", "train.py "),
        ):
            line = bash.type(f"python submit.py {typed}\t", shown)
            assert line.replace("\r", "").endswith(shown), line
            bash.type("\x15", "")  # takes the line back
    finally:
        bash.close()


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
