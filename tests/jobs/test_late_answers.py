"""What another host has done counts at once, also where `stat` and `exists` still answer from before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.agent.lease import Lease
from jobs.run_dir import RunDirectory
from tests.late_answers import answer_late
from tests.workloads.training.test_checkpoint_files import save
from workloads.errors import SupersededError
from workloads.training import checkpoint_files as files


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run whose first attempt has asked for everything that comes later: none of it is there, for a minute."""
    run = RunDirectory(tmp_path)
    run.begin_attempt()
    Lease(run, "node0").take(0, pytest.fail)
    undo = answer_late(str(tmp_path), 60)
    steps = [run.checkpoints, *(run.checkpoints / files.folder_name(step) for step in (1, 2))]
    asked = [run.attempt(number).path / name for number in (0, 1, 2) for name in ("", "failures", "result.json")]
    asked += [folder / name for folder in steps for name in ("", "__0_0.distcp", "__1_0.distcp", files.MANIFEST)]
    assert [path for path in asked if path.exists()] == [run.attempt(0).path, run.attempt(0).path / "failures"]
    yield run
    undo()


def test_a_later_start_ends_the_earlier_one(run: RunDirectory) -> None:
    later = run.begin_attempt()
    assert (later.number, later.path.exists()) == (1, False)
    assert Lease(run, "node0").renew(0) == 1
    with pytest.raises(SupersededError):
        run.paths(0).refuse_if_superseded()
    with pytest.raises(FileExistsError):
        run.succeed(run.attempt(0))
    run.attempt(1).make()  # as an agent does on each host
    assert run.begin_attempt().number == 2


def test_of_two_results_the_one_that_says_more_stays(run: RunDirectory) -> None:
    done = {"status": "done", "workload": "mine", "attempt": 0}
    assert run.publish(done) == done
    assert run.publish({"status": "failed", "workload": "mine", "attempt": 0}) == done
    assert run.recorded(0) == run.recorded() == done
    failed = {"status": "failed", "workload": "mine", "attempt": 1}
    assert run.publish(failed) == run.publish({**failed, "error": "later"}) == failed


def test_a_good_checkpoint_is_good_and_can_be_replaced(run: RunDirectory) -> None:
    first = save(run.checkpoints, 1)
    assert (files.published(run.checkpoints), files.problem(first)) == ([first], None)
    assert files.at_path(run.path) == files.at_path(first) == [first]
    assert files.problem(save(run.checkpoints, 1)) is None
    second = save(run.checkpoints, 2)
    assert files.published(run.checkpoints) == [second, first]
    (second / files.MANIFEST).unlink()
    assert files.problem(second) == f"{second}: manifest.json is missing"
