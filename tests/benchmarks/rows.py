"""What a benchmark returns, and how two or more ways are measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict


class Row(TypedDict):
    """One line of the table that `python -m tests.benchmarks` prints; a module's `main()` returns a list of them."""

    what: str
    """What is measured."""
    against: str
    """What it is measured against, in the same run."""
    ratio: float
    """what / against; smaller is better."""
    at_most: float
    """The goal for the ratio."""
    detail: str
    """The figures behind the ratio, with their units."""


def ratio_of_neighbors(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of each of ours over the mean of its two neighbors among theirs.

    The two alternate, theirs first and last: whatever slows the machine down for a while slows both.

    Args:
        ours: n measurements.
        theirs: n + 1; `ours[i]` was measured between `theirs[i]` and `theirs[i + 1]`.
    """
    assert len(theirs) == len(ours) + 1
    pairs = zip(ours, theirs, theirs[1:], strict=False)
    return statistics.median(own / ((before + after) / 2) for own, before, after in pairs)


class Times(NamedTuple):
    """Seconds by the clock on the wall, and of CPU time that this process, all its threads, has taken."""

    wall: float
    cpu: float

    def since(self, began: Times) -> Times:
        return Times(self.wall - began.wall, self.cpu - began.cpu)


def now() -> Times:
    return Times(time.perf_counter(), time.process_time())


def compare(ranks: Sequence[Mapping[str, Sequence[Times]]], theirs: str) -> tuple[float, str]:
    """The ratio of a row, by rank 0's clock, and its detail, which also has the CPU time of all ranks.

    Where ranks share cores that others use too, the ratio by the clock is noisy; that of CPU time is less so, but does
    not see who waits.

    Args:
        ranks: by rank, the times of "ours" and of `theirs`, n and n + 1, taken in turn.
    """

    def of_all_ranks(side: str) -> list[float]:
        return [sum(times.cpu for times in turn) for turn in zip(*(rank[side] for rank in ranks), strict=True)]

    ours_wall, theirs_wall = ([times.wall for times in ranks[0][side]] for side in ("ours", theirs))
    cpu = ratio_of_neighbors(of_all_ranks("ours"), of_all_ranks(theirs))
    detail = f"{milliseconds(ours_wall)} against {milliseconds(theirs_wall)}; by the ranks' CPU time {cpu:.3f}"
    return ratio_of_neighbors(ours_wall, theirs_wall), detail


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, as text."""
    return f"{1000 * statistics.median(seconds):,.1f} ms"
