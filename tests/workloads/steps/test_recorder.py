"""What is written as steps end: by a thread, in order, whole, and whatever ends the rank."""

from __future__ import annotations

import json
import resource
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


def test_lines_that_cannot_be_written_are_kept_until_they_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, on which half a line may find room."""
    monkeypatch.setattr(module, "EVERY_S", 3600)
    recorder = Recorder(tmp_path / "m", nothing)
    recorder.add({"step": 1})
    assert recorder.flush()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "m").stat().st_size + 5, unlimited[1]))
    try:
        for step in (2, 3):
            recorder.add({"step": step})
            recorder.end_step()
            assert not recorder.flush(must=False)
            assert steps(tmp_path / "m") == [1]
        with pytest.raises(OSError, match=str(tmp_path / "m")):
            recorder.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "metrics cannot be written, and are kept in memory until they can"
    ]
    recorder.close()
    assert steps(tmp_path / "m") == [1, 2, 3]
    assert caplog.records[-1].message.startswith("metrics are written again, up to now they could not be: [Errno 27]")


def test_a_later_incarnations_metrics_are_not_written_to(tmp_path: Path) -> None:
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
