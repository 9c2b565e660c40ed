"""Sums and maxima over all ranks: the same bits everywhere, for any number of ranks."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch

from tests.workloads.worlds import run_world
from workloads.training.collectives import all_gather, gather_objects, sum_over_ranks, sums_and_maxima


def mine(rank: int) -> torch.Tensor:
    """Numbers of very different size, whose sum depends on its order."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(9, dtype=torch.float64, generator=generator) * 10.0 ** (rank % 5)


def reduce(ctx: Any) -> list[Any]:
    row = mine(ctx.rank)
    row[8] = math.nan if ctx.rank == 1 else 1.0
    gathered = [int(tensor) for tensor in all_gather(torch.tensor(ctx.rank))], gather_objects(f"rank {ctx.rank}")
    return [*sums_and_maxima(row).tolist(), sum_over_ranks(mine(ctx.rank)).tolist(), gathered]


def bits(row: list[float]) -> bytes:
    return struct.pack(f"{len(row)}d", *row)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [4, 7])
def test_sums_and_maxima_are_the_same_bits_on_every_rank(ranks: int) -> None:
    results = run_world(reduce, sizes=(ranks,), names=("dp",))
    rows = torch.stack([mine(rank) for rank in range(ranks)])
    for rank, (sums, maxima, alone, (tensors, objects)) in enumerate(results):
        assert tensors == list(range(ranks))
        assert objects == ([f"rank {other}" for other in range(ranks)] if rank == 0 else None)
        assert bits(sums[:8]) == bits(results[0][0][:8])
        assert alone[:8] == sums[:8]
        assert sums[:8] == pytest.approx([math.fsum(column) for column in rows.T.tolist()][:8], rel=1e-13)
        assert maxima[:8] == rows.max(0).values[:8].tolist()
        assert math.isnan(sums[8])
        assert math.isnan(maxima[8])


def test_a_rank_that_knows_no_other_is_all_there_is() -> None:
    assert sums_and_maxima(torch.ones(2)).tolist() == [[1, 1], [1, 1]]
    assert [tensor.tolist() for tensor in all_gather(torch.ones(2))] == [[1, 1]]
