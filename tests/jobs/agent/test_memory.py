"""Whether the kernel's OOM killer has killed: by files of a control group, and by a real one's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.agent.memory import OomCounter

V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
V2 = "low 0\nhigh 0\nmax 51\noom 9\noom_kill {}\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7/step_0/memory.events", V2),
        ("4:cpu,memory:/slurm/job_7", "memory/slurm/job_7/memory.oom_control", V1),
        # A container that has only its own part mounted.
        ("0::/docker/9f", "memory.events", V2),
        ("4:memory:/docker/9f", "memory/memory.oom_control", V1),
    ],
)
def test_kills_are_counted_from_the_beginning(line: str, file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(f"12:pids:/elsewhere\n{line}\n")
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(2))
    counter = OomCounter(tmp_path / "cgroup", tmp_path)
    assert counter.killed_since() == 0
    path.write_text(text.format(5))
    assert counter.killed_since() == 3
    path.unlink()
    assert counter.killed_since() == 0


def test_the_group_above_is_not_ones_own(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/slurm/job_7\n")
    for folder in (tmp_path, tmp_path / "slurm", tmp_path / "slurm/job_7"):
        folder.mkdir(exist_ok=True)
        (folder / "memory.events").write_text(V2.format(0))
    counter = OomCounter(tmp_path / "cgroup", tmp_path)
    for folder in (tmp_path, tmp_path / "slurm"):
        (folder / "memory.events").write_text(V2.format(1))
    assert counter.killed_since() == 0


@pytest.mark.parametrize("text", ["", "oom_kill_disable 0\nunder_oom 0\n"])  # no such file; Linux before 4.13
def test_a_kernel_that_does_not_tell(text: str, tmp_path: Path) -> None:
    assert OomCounter(tmp_path / "none", tmp_path).killed_since() == 0
    (tmp_path / "cgroup").write_text("4:memory:/\n")
    (tmp_path / "memory").mkdir()
    if text:
        (tmp_path / "memory/memory.oom_control").write_text(text)
    assert OomCounter(tmp_path / "cgroup", tmp_path).killed_since() == 0


LIMIT_BYTES = 48 * 2**20


HOG = """
import os, signal, sys
from pathlib import Path
from jobs.agent.memory import OomCounter
try:
    Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
except OSError as error:
    print("cannot enter:", error)
    raise SystemExit
counter = OomCounter()
def ended(what):
    if (child := os.fork()) == 0:
        what()
        os._exit(0)
    return os.wait()[1]
assert ended(lambda: os.kill(os.getpid(), signal.SIGKILL)) == signal.SIGKILL
assert counter.killed_since() == 0, "a plain kill was counted"
assert ended(lambda: bytearray(os.urandom(1)) * (4 * int(sys.argv[2]))) == signal.SIGKILL
print("killed", counter.killed_since())
"""


def test_a_real_kill_is_counted_and_a_plain_sigkill_is_not(memory_group: Callable[[int], Path]) -> None:
    command = [sys.executable, "-c", HOG, str(memory_group(LIMIT_BYTES)), str(LIMIT_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "cannot enter" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stdout) == (0, "killed 1\n"), done.stderr
