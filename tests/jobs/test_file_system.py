"""What ranks ask of the shared file system is as docs/SCALE.md says: little at start and end, nothing in a step."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.benchmarks.file_system import Calls, Counted, count, records


# What is expected of more ranks is what is found at 8: nothing grows with their number but that each has a log.
@pytest.fixture(
    scope="module",
    params=[8, pytest.param(32, marks=pytest.mark.long), pytest.param(128, marks=pytest.mark.long)],
)
def counted(request: pytest.FixtureRequest) -> Counted:
    return count(request.param)


def calls(process: Calls, phase: str) -> Counter[tuple[str, str]]:
    """By operation and path, those that the rank's own work waited for."""
    found = Counter((operation, path) for thread, operation, path in process.by_phase[phase] if thread == "main")
    return Counter({(operation, path.partition(".tmp")[0]): n for (operation, path), n in found.items()})


def test_a_rank_opens_its_log_at_start_and_nothing_else(counted: Counted) -> None:
    ranks = [process for process in counted.processes if process.rank]
    assert sorted(process.rank or 0 for process in ranks) == list(range(1, counted.ranks))
    for process in ranks:
        own = {("open", f"/attempt-0/rank-{process.rank}.log"): 1}
        assert calls(process, "start") == {**own, ("stat", ""): 1}  # on the way to the copy of the code
        assert calls(process, "steps") == {}
        assert calls(process, "end") == {}


def test_rank_0_makes_no_folder_and_no_link(counted: Counted) -> None:
    (first,) = [process for process in counted.processes if process.rank == 0]
    assert not {operation for operation, _ in calls(first, "start")} & {"mkdir", "symlink", "rename"}
    assert calls(first, "steps") == {}
    assert sum(calls(first, "end").values()) <= 25


def test_the_open_files_of_a_rank_are_as_said(counted: Counted) -> None:
    most = 22 + 2 * math.log2(counted.ranks)  # one connection more where the ranks are twice as many
    assert counted.result["result"]["open_files"] <= most + 4  # torch's own may differ by a few


def test_a_failure_that_all_ranks_see_is_one_record_by_the_rank_it_is_about() -> None:
    counted = count(4, "nan_on=2", "steps=3", check=False)
    assert counted.result["failure"]["rank"] == 2
    assert "loss is nan on rank 2 on host0" in counted.result["error"]
    assert records(counted) == ["2"]


def test_of_a_hosts_ranks_that_lose_a_peer_one_leaves_a_record() -> None:
    counted = count(16, "raises_on=2", "steps=3", check=False)
    assert counted.result["failure"]["rank"] == 2
    assert "2" in records(counted)
    assert len(records(counted)) <= 4  # here one agent has all ranks; reports that overtake each other add one or two
