"""How a run is named on the command line, from its directory and from any other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, Submitted, write_json
from jobs.runs import index
from jobs.runs.find import find, find_all, look
from jobs.runs.sweep import Sweep
from jobs.runs.sweep import write as write_sweep


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


def a_sweep(path: Path, points: int = 3, array: str = "", **again: str) -> None:
    """A sweep's folder as `submit.py` leaves it; `again` are the job IDs of points that were submitted again."""
    for number in range(points):
        a_run(path / str(number), 10, array and f"{array}_{number}")
    write_sweep(path, [{"seed": str(number)} for number in range(points)])
    os.utime(path / "sweep.json", (10, 10))
    for name, job_id in again.items():
        a_run(path / name.replace("_", ".").strip("."), 20, job_id)


def test_a_sweep_is_found_whole_and_by_its_points(home: Path) -> None:
    path = home / "here" / "runs" / "20260103-tp_fsdp-sweep-c3"
    a_sweep(path, 11, "80")
    for name in ("c3", "80", path.name, f"runs/{path.name}", str(path), "last"):
        found = look(name)
        assert isinstance(found, Sweep), name
        assert found.path == path
        assert [run.path.name for run in find_all([name])] == [str(number) for number in range(11)]
        with pytest.raises(CommandLineError, match=rf"a sweep of 11 points; name one of them, {path.name}/0 to .*/10$"):
            find(name)
    for name in ("c3/1", "80_1", f"{path.name}/1", f"runs/{path.name}/1"):
        assert find(name).path == path / "1"
    assert find("80_10").path == path / "10"
    assert find("80_10").name == f"{path.name}/10"
    with pytest.raises(CommandLineError, match="'80_11': no run known here has that job ID"):
        find("80_11")
    assert find_all(["c3", "c3/1", "80_2"]) == find_all(["c3"])


def test_of_a_point_that_was_submitted_again_the_newest_run_counts(home: Path) -> None:
    path = home / "here" / "runs" / "sweep-c3"
    a_sweep(path, 3, "80", _1_1="81", _1_2="82", _2_1="83")
    found = look("c3")
    assert isinstance(found, Sweep)
    assert [run.path.name for run in found.runs()] == ["0", "1.2", "2.1"]
    assert [found.settings_of(run) for run in found.runs()] == [{"seed": "0"}, {"seed": "1"}, {"seed": "2"}]
    assert found.next_run(0).path.name == "0.1"
    assert found.next_run(1).path.name == "1.3"
    assert find().path.parent == path
    assert "." in find().path.name
    assert find("82").path == path / "1.2"
    assert find("80_1").path == path / "1"
    run = RunDirectory(path / "1")  # it goes on in another job
    run.record_submission(Submitted("slurm", "90", "", "login"))
    assert find("90").path == find("80_1").path == path / "1"
    os.utime(run.job, (30, 30))
    assert find().path == path / "1"


def test_a_sweep_elsewhere_is_listed_and_a_damaged_one_is_no_traceback(home: Path) -> None:
    a_sweep(home / "there" / "sweep", 2)
    index.add([home / "there" / "sweep" / "0", home / "there" / "sweep" / "1"])
    assert len(find_all(["sweep"])) == 2
    (home / "there" / "sweep" / "sweep.json").write_text('{"points": 3')
    assert find("sweep/0").path == home / "there" / "sweep" / "0"
    with pytest.raises(CommandLineError, match="2 runs have that in their names: sweep/"):
        look("sweep")


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
