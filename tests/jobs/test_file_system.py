"""What ranks ask of the shared file system is as docs/SCALE.md says: little at start and end, nothing in a step."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.benchmarks.file_system import Calls, Counted, count

RANKS = 8


@pytest.fixture(scope="module")
def counted() -> Counted:
    return count(RANKS)


def calls(process: Calls, phase: str) -> Counter[tuple[str, str]]:
    """By operation and path, those that the rank's own work waited for."""
    found = Counter((operation, path) for thread, operation, path in process.by_phase[phase] if thread == "main")
    return Counter({(operation, path.partition(".tmp")[0]): n for (operation, path), n in found.items()})


def test_a_rank_opens_its_log_at_start_and_nothing_else(counted: Counted) -> None:
    ranks = [process for process in counted.processes if process.rank]
    assert sorted(process.rank or 0 for process in ranks) == list(range(1, RANKS))
    for process in ranks:
        own = {("open", f"/attempt-0/rank-{process.rank}.log"): 1}
        assert calls(process, "start") == {**own, ("stat", ""): 1}  # on the way to the copy of the code
        assert calls(process, "steps") == {}
        assert calls(process, "end") == {}


def test_rank_0_makes_no_folder_and_no_link(counted: Counted) -> None:
    (first,) = [process for process in counted.processes if process.rank == 0]
    assert not {operation for operation, _ in calls(first, "start")} & {"mkdir", "symlink", "rename"}
    assert calls(first, "steps") == {}


def test_the_open_files_of_a_rank_are_as_said(counted: Counted) -> None:
    assert counted.result["result"]["open_files"] <= 22 + 3 * RANKS + 4  # torch's own may differ by a few


def test_a_failure_that_all_ranks_see_is_one_record_by_the_rank_it_is_about() -> None:
    counted = count(4, "nan_on=2", "steps=3", check=False)
    assert counted.result["failure"]["rank"] == 2
    assert "loss is nan on rank 2 on host0" in counted.result["error"]
    recorded = [
        path.partition(".json")[0]
        for process in counted.processes
        for calls in process.by_phase.values()
        for _, operation, path in calls
        if operation == "rename" and path.startswith("/attempt-0/failures/")
    ]
    assert recorded == ["/attempt-0/failures/.2"]
