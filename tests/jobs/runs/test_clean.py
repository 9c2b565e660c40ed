"""Which run directories go, and which never do."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory
from jobs.runs import index
from jobs.runs.clean import Conditions, choose, parse_age, parse_size, parse_states, remove, size_of
from tests.jobs.runs.some_runs import a_run

DONE, FAILED = {"status": "done"}, {"status": "failed", "error": "rank 1: ValueError: mine"}
TIMED_OUT = {"status": "failed", "error": "job 12 reached its time limit", "slurm_state": "TIMEOUT"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(tmp_path / "no Slurm here"))
    monkeypatch.chdir(tmp_path)


def names(runs: Sequence[RunDirectory], **conditions: object) -> list[str]:
    """The names of those that go."""
    return [one.run.name for one in choose(runs, Conditions(**conditions), runs).going]  # type: ignore[arg-type]


def test_conditions_combine(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / "old", record=DONE),
        a_run(tmp_path / "failed", record=FAILED),
        a_run(tmp_path / "timed out", record=TIMED_OUT),
        a_run(tmp_path / "new", executor="local", record=FAILED, is_old=False),
    ]
    (tmp_path / "old" / "checkpoints").mkdir()
    (tmp_path / "old" / "checkpoints" / "weights").write_bytes(b"\1" * 2_000_000)
    assert names(runs) == ["old", "failed", "timed out", "new"]
    assert names(runs, older_than_s=3600.0) == ["old", "failed", "timed out"]
    assert names(runs, states=parse_states("failed")) == ["failed", "timed out", "new"]
    assert names(runs, states=parse_states("Failed"), older_than_s=3600.0) == ["failed", "timed out"]
    assert names(runs, states=parse_states("timeout")) == ["timed out"]
    assert names(runs, states=parse_states("done,stopped")) == ["old"]
    assert names(runs, larger_than=parse_size("1M")) == ["old"]
    assert names(runs, larger_than=parse_size("1M"), states=parse_states("failed")) == []


def test_what_may_be_alive_or_is_unknown_stays(tmp_path: Path) -> None:
    kept = [
        a_run(tmp_path / "no result"),
        a_run(tmp_path / "elsewhere", executor="local", host="elsewhere"),
        a_run(tmp_path / "debug", executor="debug", job_id=""),
        a_run(tmp_path / "new on Slurm", record=DONE, is_old=False),
        a_run(tmp_path / "goes on", record={**FAILED, "next_attempt": 1}),
        a_run(tmp_path / "of another version", executor="local", record={"status": "a new word"}),
    ]
    damaged = a_run(tmp_path / "damaged", record=DONE)
    damaged.attempt(0).result.write_text("{")
    choice = choose([*kept, damaged], Conditions(), [])
    assert choice.going == []
    assert [path.name for path in choice.kept] == [run.path.name for run in [*kept, damaged]]


def test_what_is_no_run_directory_or_a_link_stays(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", record=DONE)
    (tmp_path / "link").symlink_to(run.path)
    theirs = a_run(tmp_path / "theirs", record=DONE)
    theirs.job.write_text('{"workload": "x", "name": "a job.json of another program"}')
    linked = a_run(tmp_path / "linked", record=DONE)
    linked.job.rename(tmp_path / "job.json")
    linked.job.symlink_to(tmp_path / "job.json")
    choice = choose([RunDirectory(tmp_path / "link"), theirs, linked], Conditions(), [])
    assert choice.going == []
    assert set(choice.kept.values()) == {"is a link, is not yours, or is not a run directory of this version"}


def test_what_a_run_that_may_be_alive_refers_to_stays(tmp_path: Path) -> None:
    used, other = a_run(tmp_path / "used ü", record=DONE), a_run(tmp_path / "used", record=DONE)
    outer = a_run(tmp_path / "outer", record=DONE)
    inner = a_run(outer.path / "runs" / "inner")
    user = a_run(tmp_path / "user", settings={"resume": str(used.path / "checkpoints")})
    choice = choose([used, other, outer], Conditions(), [user, inner])
    assert [one.run.name for one in choice.going] == ["used"]
    assert choice.kept[used.path] == f"is referred to by {user.path}, which has not ended"
    assert choice.kept[outer.path] == f"is referred to by {inner.path}, which has not ended"


def test_a_removed_run_is_gone_and_forgotten_and_links_are_not_followed(tmp_path: Path) -> None:
    run, other = a_run(tmp_path / "run", record=DONE), a_run(tmp_path / "other", record=DONE)
    index.add([run.path, other.path])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_bytes(b"\1" * 1_000_000)
    (run.path / "data").symlink_to(precious)
    (run.path / "file").write_bytes(b"\1" * 500_000)
    os.link(run.path / "file", run.path / "again")  # counts once
    going = choose([run], Conditions(), []).going[0]
    assert 500_000 < going.size < 900_000
    assert remove(going) == ""
    assert not run.path.exists()
    assert (precious / "data").exists()
    assert index.path().read_text() == f"{other.path}\n"


def test_a_run_that_was_resumed_in_the_meantime_stays(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", record=DONE)
    going = choose([run], Conditions(), []).going[0]
    run.put_away(run.submitted())
    assert remove(going) == "has changed in the meantime, so it was not removed"
    assert run.job.exists()


def test_a_size_is_what_is_on_the_disk(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**9)
    assert size_of(tmp_path) < 100_000
    assert size_of(tmp_path / "gone") == 0


def test_ages_sizes_and_states_as_people_write_them() -> None:
    assert [parse_age(text) for text in ("90m", "12h", "30d", "1.5w")] == [5400, 43_200, 2_592_000, 907_200]
    assert [parse_size(text) for text in ("1K", "1.5M", "10G", "10GB", "10gib", "2T")] == [
        *(1024, 1_572_864, 10 * 2**30, 10 * 2**30, 10 * 2**30, 2 * 2**40)
    ]
    assert parse_states("completed, Canceled") == {"COMPLETED", "CANCELLED"}
    assert time.time() - 1_700_000_000 > parse_age("30d")  # what `is_old` means to the tests above


@pytest.mark.parametrize("parse", [parse_age, parse_size, parse_states], ids=lambda parse: parse.__name__)
@pytest.mark.parametrize(
    "text", ["", "3", "d", "-3d", "3 d", "3x", "1e9G", "٣d", "running", "unknown", "faild", "9" * 400]
)
def test_anything_else_is_refused(parse: object, text: str) -> None:
    with pytest.raises(CommandLineError, match=r"^--(older-than|larger-than|state) .*[:;] "):
        parse(text)  # type: ignore[operator]
