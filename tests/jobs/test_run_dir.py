"""The run directory: nobody else's, never shared by two jobs, and each file whole or not there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs import run_dir
from jobs.errors import RunDirectoryError
from jobs.run_dir import RunDirectory, Submitted, default_run_dir, open_regular, read_json, write_json, write_text
from tests.fork_server import fork_server


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_directory_is_its_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        run = RunDirectory.create(tmp_path / "runs" / "one")
        attempt = run.attempt(0).make()
    finally:
        os.umask(old)
    assert [mode(p) for p in (run.path, run.submitit, attempt.path)] == [0o700] * 3


def test_what_keeps_files_from_being_written_is_said(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).fault() == ""
    assert list(tmp_path.iterdir()) == []
    gone = tmp_path / "gone"
    assert RunDirectory(gone).fault() == f"{gone} cannot be written to: No such file or directory"


def test_an_empty_directory_may_be_taken_and_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.mkdir(mode=0o755)
    RunDirectory.create(path)
    assert mode(path) == 0o700


@pytest.mark.parametrize("content", [".hidden", "result.json"])
def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / content).touch()
    for refuse in (RunDirectory.check, RunDirectory.create):
        with pytest.raises(RunDirectoryError, match=r"--run-dir .*empty"):
            refuse(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [content]


def test_a_file_in_its_place_or_above_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(RunDirectoryError, match="--run-dir"):
            RunDirectory.check(path)
        with pytest.raises(RunDirectoryError, match="--run-dir"):
            RunDirectory.create(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="--run-dir"):
        RunDirectory.check(tmp_path / "run")


def test_checking_writes_nothing(tmp_path: Path) -> None:
    RunDirectory.check(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == []


DONE = {"status": "done", "attempt": 0}
FAILED: dict[str, Any] = {"status": "failed", "attempt": 0}
NAMED = {**FAILED, "failure": {"rank": 1}}
TIMED_OUT = {**FAILED, "slurm_state": "TIMEOUT"}


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("order", [(DONE, NAMED), (NAMED, FAILED), (TIMED_OUT, FAILED), (NAMED, TIMED_OUT)])
def test_the_record_that_counts_more_stays_whichever_comes_first(
    order: tuple[dict[str, Any], ...], has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links on this file system")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    for sequence in (order, order[::-1]):
        run = RunDirectory(tmp_path / str(len(list(tmp_path.iterdir()))))
        run.path.mkdir()
        assert [run.publish(dict(record)) for record in sequence][-1] == order[0]
        assert read_json(run.result) == order[0]
        assert sorted(path.name for path in run.path.iterdir()) == ["attempt-0", "metrics.jsonl", "result.json"]
        assert sorted(path.name for path in run.attempt(0).path.iterdir()) == ["failures", "result.json"]


def test_a_record_that_comes_while_another_is_replaced_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    run.publish(dict(FAILED))
    read = run_dir.read_json

    def read_and_then_another_finishes(path: Path) -> Any:
        value = read(path)
        monkeypatch.setattr(run_dir, "read_json", read)
        run.publish(dict(DONE))
        return value

    monkeypatch.setattr(run_dir, "read_json", read_and_then_another_finishes)
    assert run.publish(dict(NAMED)) == DONE
    assert read_json(run.result) == DONE


def _create(path: Path, barrier: threading.Barrier, results: multiprocessing.SimpleQueue[str]) -> None:
    barrier.wait()
    try:
        RunDirectory.create(path)
        results.put("mine")
    except RunDirectoryError:
        results.put("refused")


def test_of_two_that_race_for_a_name_one_has_it(tmp_path: Path) -> None:
    context = fork_server()
    for attempt in range(3):
        barrier, results = context.Barrier(4), context.SimpleQueue()
        racers = [
            context.Process(target=_create, args=(tmp_path / f"run{attempt}", barrier, results)) for _ in range(4)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(20)
        assert sorted(results.get() for _ in racers) == ["mine", "refused", "refused", "refused"]


def test_default_names_differ_and_lie_below_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {default_run_dir("my_package.mine:ENTRY") for _ in range(20)}
    assert len(names) > 1
    for name in names:
        assert name.parent == tmp_path / "runs"
        assert "-my_package.mine-" in name.name


def test_a_reader_sees_whole_files_only(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "f.json", threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if path.exists():
                seen.append(len(json.loads(path.read_text())))

    reader = threading.Thread(target=read)
    reader.start()
    for size in [1, 100_000] * 20:
        write_json(path, [0] * size)
    stop.set()
    reader.join()
    assert set(seen) <= {1, 100_000}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_reading_what_is_not_there_or_not_whole_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "gone.json") is None
    (tmp_path / "half.json").write_text('{"a": ')
    assert read_json(tmp_path / "half.json") is None


def test_the_newest_attempt_is_the_largest_number(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.last_attempt().number == 0
    for number in (0, 2, 10):
        run.attempt(number).make()
    (tmp_path / "attempt-x").mkdir()
    assert run.last_attempt().number == 10


def test_what_is_at_the_top_is_the_newest_attempts(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    for number in range(3):
        assert run.begin_attempt().number == number
        assert not run.metrics.exists()  # no step has ended
        assert not run.result.exists()
        assert run.recorded() is None
        run.attempt(number).metrics.write_text(f"{number}\n")
        record = {"status": "failed", "attempt": number}
        assert run.publish(dict(record)) == run.recorded() == read_json(run.result) == record
        assert run.metrics.read_text() == f"{number}\n"
    # An attempt on a host that the scheduler gave up ends late; its successor's result stands.
    assert run.publish(dict(DONE)) == run.recorded(0) == DONE
    assert run.recorded() == read_json(run.result) == record
    moved = RunDirectory(run.path.rename(tmp_path / "moved"))
    with open_regular(moved.metrics) as file:
        assert file.read() == b"2\n"
    assert read_json(moved.result) == record


def test_of_an_attempt_that_ended_before_it_had_metrics_those_before_are_shown(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.begin_attempt().metrics.write_text("0\n")
    run.publish({"status": "failed", "attempt": 0})
    run.begin_attempt()
    assert not run.metrics.exists()
    run.publish({"status": "failed", "attempt": 1})
    assert run.metrics.read_text() == "0\n"
    run.begin_attempt().metrics.write_text("2\n")
    assert run.metrics.read_text() == "2\n"


def test_a_link_that_is_late_is_put_right_by_who_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt begins, and is shown, between the look for the newest and the link to it."""
    run, link = RunDirectory(tmp_path), os.symlink

    def another_begins(*words: Any, **more: Any) -> None:
        monkeypatch.setattr(os, "symlink", link)
        assert run.begin_attempt().number == 1
        link(*words, **more)

    monkeypatch.setattr(os, "symlink", another_begins)
    assert run.begin_attempt().number == 0
    assert [str(top.readlink()) for top in (run.metrics, run.result)] == [
        "attempt-1/metrics.jsonl",
        "attempt-1/result.json",
    ]


def test_of_several_that_begin_an_attempt_each_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each has looked before any of the others began."""
    run = RunDirectory(tmp_path)
    with monkeypatch.context() as before:
        before.setattr(RunDirectory, "_attempts", lambda _: [])
        assert [run.begin_attempt().number for _ in range(3)] == [0, 1, 2]
    assert run.begin_attempt().number == 3
    assert str(run.result.readlink()) == "attempt-3/result.json"


def test_a_file_system_without_symbolic_links_has_a_copy_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "no symbolic links on this file system")

    monkeypatch.setattr(os, "symlink", refuse)
    run = RunDirectory(tmp_path)
    run.begin_attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["attempt-0"]
    run.publish(dict(DONE))
    assert read_json(run.result) == DONE
    run.begin_attempt()
    assert not run.result.exists()
    run.publish(dict(NAMED))  # late
    assert not run.result.exists()
    later = {**FAILED, "attempt": 1}
    run.publish(dict(later))
    assert read_json(run.result) == later


def test_a_workload_is_told_the_same_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = run.paths(3)
    assert (paths.run_dir, paths.metrics, paths.data_dir) == (tmp_path, run.attempt(3).metrics, run.data)
    assert paths.attempt_dir == run.attempt(3).path


def test_a_result_that_an_earlier_version_left_at_the_top_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.attempt(0).make()
    write_json(run.result, DONE)
    assert run.recorded() == DONE
    run.attempt(1).make()
    assert run.recorded() is None  # that of another attempt says nothing of this one


def test_of_two_commands_that_go_on_with_a_run_one_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for path in (run.job, run.settings):
        path.write_text(path.name)
    run.record_submission(Submitted.now("local", "12"))
    seen = run.submitted()
    run.put_away(seen)
    with pytest.raises(RunDirectoryError, match="another command goes on with it"):
        run.put_away(seen)
    run.record_submission(Submitted.now("local", "13"))
    with pytest.raises(RunDirectoryError, match="another command goes on with it"):
        run.put_away(seen)
    now = run.submitted()
    assert now is not None
    assert now.job_id == "13"


@pytest.mark.parametrize("result", [None, {"status": "failed", "error": "x", "attempt": 1}])
def test_what_is_put_away_for_a_next_attempt_can_be_put_back(tmp_path: Path, result: dict[str, Any] | None) -> None:
    run = RunDirectory(tmp_path)
    for number in (0, 1):
        run.attempt(number).make()
    for path in (run.job, run.settings):
        path.write_text(path.name)
    run.record_submission(Submitted.now("local", "12"))
    if result is not None:
        write_json(run.attempt(1).result, result)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    away = run.put_away(run.submitted())
    assert run.job.exists()
    assert run.settings.exists()
    assert not run.submission.exists()
    ended = run.recorded()
    assert ended is not None
    assert ended["next_attempt"] == 2
    run.put_back(away)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    assert after == before
