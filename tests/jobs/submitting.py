"""`python submit.py` as a user types it, in a process of its own, and what of it is still running afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SUBMIT = str(ROOT / "submit.py")
DEADLINE_S = 60
"""Generous: the box may be busy. What is tested for being quick has its own bound."""


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {deadline_s} s")


@dataclass
class Line:
    """One typed line; its processes carry a mark in their environment, by which they are found."""

    directory: Path
    mark: str
    process: subprocess.Popen[str]

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def finish(self, deadline_s: float = DEADLINE_S) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out, err

    def result(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "result.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, step: int, deadline_s: float = DEADLINE_S) -> None:
        def ended() -> bool:
            return self.process.poll() is not None and not self.left()

        wait_until(lambda: len(self.metrics()) >= step or ended(), f"step {step}", deadline_s)
        assert len(self.metrics()) >= step, "the job ended before"

    def writable_by_others(self) -> list[Path]:
        return [path for path in self.run_dir.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]

    def left(self) -> dict[int, str]:
        """The processes that still run: ranks, their agent, and what they started."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def assert_nothing_left(self, deadline_s: float = 20) -> None:
        wait_until(lambda: not self.left(), f"no process left, but {self.left()}", deadline_s)

    def kill_everything(self) -> None:
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def submit(directory: Path, *words: str, mark_by_flag: bool = True, **popen: Any) -> Line:
    """Types the line in `directory`, where `mine.py` is a workload and `run` becomes the run directory."""
    if not (directory / "mine.py").exists():
        shutil.copy(Path(__file__).with_name("sample_workload.py"), directory / "mine.py")
    mark = f"mark-{uuid.uuid4().hex}"
    flags = ("--run-dir", "run", *(("--env", f"TEST_MARK={mark}") if mark_by_flag else ()))
    words = (*flags, *words) if "script" in words else (*words, *flags)  # what follows a script is its own
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, SUBMIT, *words], cwd=directory, text=True, **{**streams, **popen})
    return Line(directory, mark, process)


def assert_ended_like_a_script(directory: Path, steps: int = 3) -> None:
    """What the sample workload's `at_end=a script` leaves, on every rank, and nothing that its forked children left."""
    for left in ("left-open", "hook", "thread"):
        assert [(directory / f"{left}-{rank}").read_text() for rank in (0, 1)] == ["whole"] * 2, left
    run = directory / "run"
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
    assert list((run / "attempt-0" / "failures").iterdir()) == []
