"""How a run is named on the command line, from its directory and from any other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, Submitted, write_json
from jobs.runs import index
from jobs.runs.find import find


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def a_run(path: Path, started: int, job_id: str = "") -> Path:
    path.mkdir(parents=True)
    run = RunDirectory(path)
    write_json(run.job, {})
    if job_id:
        run.record_submission(Submitted("slurm", job_id, "", "login"))
    os.utime(run.job, (started, started))
    return path


def test_a_run_is_found_by_path_name_part_job_id_and_as_the_last_one(home: Path) -> None:
    here = a_run(home / "here" / "runs" / "20260101-tp_fsdp-a1", 1, "71")
    there = a_run(home / "there" / "20260102-tp_fsdp-b2", 3, "1234")
    index.add([there])
    for name in (str(here), "20260101-tp_fsdp-a1", "runs/20260101-tp_fsdp-a1", "a1", "71"):
        assert find(name).path == here
    for name in (str(there), "20260102-tp_fsdp-b2", "b2", "1234", "last"):
        assert find(name).path == there
    assert find().path == there
    with pytest.raises(CommandLineError, match=r"'tp_fsdp': 2 runs have that in their names: 20260102-.*; give more"):
        find("tp_fsdp")
    (home / "here" / "tp_fsdp-a1").mkdir()  # a folder that happens to have the name that is meant
    assert find("tp_fsdp-a1").path == here


def test_a_run_is_listed_once_it_was_seen_and_only_while_it_is_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(home / "here" / "runs" / "first", 1)
    assert [one.path for one in index.runs()] == [run]
    monkeypatch.chdir(home)
    assert [one.path for one in index.runs()] == [run]
    index.path().unlink()  # never needed
    assert index.runs() == []
    assert find(str(run)).path == run
    monkeypatch.chdir(home / "here")
    assert find("first").path == run
    assert index.path().read_text() == f"{run}\n"
    RunDirectory(run).job.unlink()
    assert index.runs() == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is not a run"),
        ("x" * 300, "File name too long"),
        ("firs/t", "no such run"),
        ("frist", "did you mean 'first'"),
        ("99", "no run known here has that job ID"),
        (".", "is not a run directory"),
    ],
)
def test_what_is_no_run_is_refused(home: Path, name: str, says: str) -> None:
    a_run(home / "here" / "runs" / "first", 1)
    with pytest.raises(CommandLineError, match=says):
        find(name)


def test_without_any_run_there_is_no_last_one(home: Path) -> None:
    with pytest.raises(CommandLineError, match=r"there is no run, neither in ./runs nor in .*/state/meshrun/runs"):
        find()


def test_a_list_that_cannot_be_written_or_read_is_no_error(home: Path) -> None:
    (home / "state").write_text("a file where the folder should be")
    run = a_run(home / "here" / "runs" / "first", 1)
    assert find("last").path == run
