"""What a benchmark returns, and how two or more ways are measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict


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


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, as text."""
    return f"{1000 * statistics.median(seconds):,.1f} ms"
