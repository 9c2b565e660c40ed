"""status.json is small however many ranks there are, and says of the one that is furthest behind what a person asks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.blame import LastSeen
from jobs.status import LISTED, in_words, status


def test_thousands_of_ranks_are_counted_and_those_furthest_behind_listed() -> None:
    ranks = [LastSeen(rank, f"node{rank // 8}", "9", 0.5, "data") for rank in range(8192)]
    ranks[5000] = LastSeen(5000, "node625", "7", 40.25, "forward")
    record = json.loads(json.dumps(status(ranks, 1e9), allow_nan=False))
    assert (record["running"], record["last_step"]) == (8192, 9)
    assert record["phases"] == {"data": 8191, "forward": 1}
    assert [seen["rank"] for seen in record["behind"]] == [5000, *range(LISTED - 1)]
    assert in_words(record) == (
        "its ranks had finished step 9, but rank 5000 on node625 only step 7 (in forward for 40 s)"
    )
    assert len(json.dumps(record)) < 2**14


def test_a_rank_that_is_behind_for_a_moment_is_not_singled_out() -> None:
    ranks = [LastSeen(0, "node0", "9", 0.5, "data"), LastSeen(1, "node0", "8", 1.5, "forward")]
    assert in_words(status(ranks, 1e9)) == "its ranks had finished step 9"


@pytest.mark.parametrize(
    "record", [None, {}, {"last_step": "x"}, {"last_step": 3, "behind": []}, status([], 1e9), {"behind": 3}], ids=str
)
def test_what_says_nothing_is_nothing(record: dict[str, Any] | None) -> None:
    assert in_words(record) == ""


def test_of_ranks_that_have_all_ended_the_last_step_is_left() -> None:
    assert in_words(status([], 1e9, last_step=7)) == "its ranks had finished step 7"
    assert in_words(status([], 1e9)) == ""
    starting = LastSeen(1, "node1", "", 4.8, "starting")
    assert in_words(status([starting], 1e9, last_step=7)) == "its ranks had finished step 7"
