"""Which layers a stage gets: the cut of a model that makes the costliest stage as cheap as can be. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def layer_costs(widths: Sequence[int]) -> list[int]:
    """What each of an MLP's matrices costs in a step, in multiplications a sample.

    One multiplication a weight going forward and two going back, for the gradients of its input and of itself; nobody
    needs the gradient of the first one's input.

    Args:
        widths: of the input, of what each layer gives, and so of the output; one more than there are layers.
    """
    return [(2 if layer == 0 else 3) * a * b for layer, (a, b) in enumerate(itertools.pairwise(widths))]


def partition(costs: Sequence[float], parts: int) -> list[range]:
    """Cuts a row of costs into contiguous parts, none empty, so that the costliest is as cheap as possible.

    Exact, by dynamic programming. Of several such cuts it is the one whose parts differ least (the least sum of
    squares).

    Raises:
        ValueError: there are fewer costs than parts.
    """
    number = len(costs)
    if not 1 <= parts <= number:
        raise ValueError(f"{number} layers cannot be cut into {parts} parts, none of them empty")
    sums = [0.0, *itertools.accumulate(costs)]
    # largest[k][n]: of the best cut of the first n into k, its costliest part.
    largest = [[math.inf] * (number + 1) for _ in range(parts + 1)]
    largest[0][0] = 0.0
    for k in range(1, parts + 1):
        for n in range(k, number + 1):
            largest[k][n] = min(max(largest[k - 1][cut], sums[n] - sums[cut]) for cut in range(k - 1, n))
    allowed = largest[parts][number]
    # squares[k][n]: likewise the least sum of squares, and where the last part begins, with no part beyond `allowed`.
    squares = [[(math.inf, 0)] * (number + 1) for _ in range(parts + 1)]
    squares[0][0] = (0.0, 0)
    for k in range(1, parts + 1):
        for n in range(k, number + 1):
            cuts = [cut for cut in range(k - 1, n) if sums[n] - sums[cut] <= allowed]
            found = [(squares[k - 1][cut][0] + (sums[n] - sums[cut]) ** 2, cut) for cut in cuts]
            squares[k][n] = min(found, default=(math.inf, 0))
    cut_parts: list[range] = []
    end = number
    for k in range(parts, 0, -1):
        start = squares[k][end][1]
        cut_parts.append(range(start, end))
        end = start
    return cut_parts[::-1]
