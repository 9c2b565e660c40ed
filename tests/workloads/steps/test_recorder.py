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


def test_lines_come_by_themselves_and_from_no_other_thread(tmp_path: Path) -> None:
    writers: set[str] = set()
    threads = set(threading.enumerate())
    recorder = Recorder(tmp_path / "m", lambda: writers.add(threading.current_thread().name))
    for step in range(1, 6):
        recorder.end_step()
        recorder.add({"step": step, "loss": float("nan")})
    wait_until(lambda: steps(tmp_path / "m") == [1, 2, 3, 4, 5])
    assert writers == {"recorder"}
    assert json.loads((tmp_path / "m").read_text().splitlines()[0]) == {"step": 1, "loss": None}
    recorder.close()
    assert set(threading.enumerate()) <= threads


def test_close_writes_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 3600)
    recorder = Recorder(tmp_path / "m", nothing)
    recorder.end_step()
    recorder.add({"step": 1})
    recorder.flush()
    recorder.end_step()
    recorder.add({"step": 2})
    assert steps(tmp_path / "m") == [1]
    recorder.close()
    assert steps(tmp_path / "m") == [1, 2]


def test_what_keeps_a_line_from_being_written_ends_the_rank(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "no folder" / "m", nothing)
    recorder.add({"step": 1})
    with pytest.raises(OSError, match="no folder"):
        recorder.flush()
    with pytest.raises(OSError, match="no folder"):
        recorder.end_step()
    recorder.close()

    def refuse() -> None:
        raise SupersededError("newer")

    superseded = Recorder(tmp_path / "m", refuse)
    superseded.add({"step": 1})
    superseded.close()  # says nothing: it may follow an error
    assert not (tmp_path / "m").exists()


def test_a_rank_without_lines_has_no_thread() -> None:
    threads = set(threading.enumerate())
    recorder = Recorder(None, nothing)
    recorder.end_step()
    recorder.add({"step": 1})
    assert set(threading.enumerate()) == threads
    recorder.flush()
    recorder.close()
