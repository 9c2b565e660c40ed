"""What is written as steps end: by a thread, in order, whole, and whatever ends the rank."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.errors import SupersededError
from workloads.steps import recorder as module
from workloads.steps.recorder import Recorder


def nothing() -> None:
    pass


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_lines_and_heartbeat_come_by_themselves_and_from_no_other_thread(tmp_path: Path) -> None:
    writers: set[str] = set()
    threads = set(threading.enumerate())
    recorder = Recorder(tmp_path / "m", tmp_path / "b", 1, lambda: writers.add(threading.current_thread().name))
    for step in range(1, 6):
        recorder.end_step(step)
        recorder.add({"step": step, "loss": float("nan")})
    wait_until(lambda: steps(tmp_path / "m") == [1, 2, 3, 4, 5])
    wait_until((tmp_path / "b").exists)
    assert (tmp_path / "b").read_text() == "5\n"
    recorder.end_step(6)  # within the same second; nothing comes after it that would have it written
    wait_until(lambda: (tmp_path / "b").read_text() == "6\n")
    assert writers == {"recorder"}
    assert json.loads((tmp_path / "m").read_text().splitlines()[0]) == {"step": 1, "loss": None}
    recorder.close()
    assert set(threading.enumerate()) <= threads


def test_close_writes_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 3600)
    recorder = Recorder(tmp_path / "m", tmp_path / "b", 1, nothing)
    recorder.end_step(1)
    recorder.add({"step": 1})
    recorder.flush()
    recorder.end_step(2)
    recorder.add({"step": 2})
    assert steps(tmp_path / "m") == [1]
    recorder.close()
    assert steps(tmp_path / "m") == [1, 2]
    assert (tmp_path / "b").read_text() == "2\n"


def test_what_keeps_a_line_from_being_written_ends_the_rank(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "no folder" / "m", tmp_path / "b", 1, nothing)
    recorder.add({"step": 1})
    with pytest.raises(OSError, match="no folder"):
        recorder.flush()
    with pytest.raises(OSError, match="no folder"):
        recorder.end_step(2)
    recorder.close()

    def refuse() -> None:
        raise SupersededError("newer")

    superseded = Recorder(tmp_path / "m", tmp_path / "b", 1, refuse)
    superseded.add({"step": 1})
    superseded.close()  # says nothing: it may follow an error
    assert not (tmp_path / "m").exists()


def test_ranks_without_lines_write_heartbeats_alone_and_many_ranks_seldom(tmp_path: Path) -> None:
    recorder = Recorder(None, tmp_path / "b", 1024 * module.HEARTBEATS_A_SECOND, nothing)
    for step in (1, 2):
        recorder.end_step(step)
        recorder.add({"step": step})
        recorder._write(last=False)
    assert (tmp_path / "b").read_text() == "1\n"  # the next is due in 1024 s
    recorder.close()
    assert (tmp_path / "b").read_text() == "2\n"
