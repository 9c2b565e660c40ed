"""Reductions over all ranks that come to the same bits on each, and whose cost grows with log2 of their number."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 6411
"""Tells these from what a workload sends on the default group."""


def sum_over_ranks(mine: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on each; all call it. Without a process group, this rank is all there is."""
    return sums_and_maxima(mine)[0] if mine.device.type == "cpu" else _all_reduce(mine, dist.ReduceOp.SUM)


def sums_and_maxima(mine_R: Tensor) -> Tensor:
    """The elements' sums and their maxima over all ranks; all call it with tensors of one length.

    On CUDA it is queued on the current stream, and nobody waits for it. A maximum may pass over a NaN there.

    Returns:
        (2, R), on the same device.
    """
    if mine_R.device.type != "cpu":
        return torch.stack([_all_reduce(mine_R, op) for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX)])
    return _exchange(mine_R) if dist.is_initialized() else torch.stack((mine_R, mine_R))


def _all_reduce(mine: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = mine.clone()
    if dist.is_initialized():
        dist.all_reduce(reduced, op)
    return reduced


def _exchange(row: Tensor) -> Tensor:
    """Sums and maxima, by recursive doubling (Thakur, Rabenseifner, Gropp 2005, "Optimization of collective
    communication operations in MPICH"): log2(N) waits, where gloo's own all_reduce and all_gather are rings of N.

    The two ranks of a pair add the same two rows, and addition commutes, so all ranks come to the same bits.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = torch.stack((row, row))
    theirs = torch.empty_like(mine)
    (sums, maxima), (their_sums, their_maxima) = mine, theirs

    def add_from(peer: int, *, give: bool) -> None:
        coming = dist.irecv(theirs, peer, tag=_TAG)
        if give:
            dist.send(mine, peer, tag=_TAG)
        assert coming is not None
        coming.wait()
        sums.add_(their_sums)
        torch.maximum(maxima, their_maxima, out=maxima)

    # Ranks beyond a power of two give theirs to one below, and get what it all came to.
    paired = 1 << (ranks.bit_length() - 1)
    if rank >= paired:
        dist.send(mine, rank - paired, tag=_TAG)
        dist.recv(mine, rank - paired, tag=_TAG)
        return mine
    if rank + paired < ranks:
        add_from(rank + paired, give=False)
    distance = 1
    while distance < paired:
        add_from(rank ^ distance, give=True)
        distance *= 2
    if rank + paired < ranks:
        dist.send(mine, rank + paired, tag=_TAG)
    return mine
