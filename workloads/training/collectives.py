"""Reductions that give each rank the same bits, at a cost of log2 of the number of ranks; and gathers, by rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 6411
"""Distinguishes these messages from those that a workload sends on the default group."""


def sum_over_ranks(mine: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on every rank; all call it. Without a process group, this rank is the only one."""
    return sums_and_maxima(mine)[0] if mine.device.type == "cpu" else _all_reduce(mine, dist.ReduceOp.SUM)


def sums_and_maxima(mine_R: Tensor) -> Tensor:
    """The elements' sums and their maxima over all ranks; all call it with tensors of one length.

    On CUDA it is queued on the current stream, and the host does not wait for it; a maximum may ignore a NaN there.

    Returns:
        (2, R), on the same device.
    """
    if mine_R.device.type != "cpu":
        return torch.stack([_all_reduce(mine_R, op) for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX)])
    return _over_a_tree(mine_R) if dist.is_initialized() else torch.stack((mine_R, mine_R))


def all_gather(mine: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors of the group's ranks, by rank, on each of them; all call it with tensors of one shape and type.

    Args:
        group: None for the default group. Without a process group, this rank is the only one.
    """
    if not dist.is_initialized():
        return [mine]
    tensors = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, mine, group=group)
    return tensors


def gather_objects(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """The objects of the group's ranks, by rank, on its rank 0; None on the others. All call it."""
    objects = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(mine, objects, group=group, group_dst=0)
    return objects


def _all_reduce(mine: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = mine.clone()
    if dist.is_initialized():
        dist.all_reduce(reduced, op)
    return reduced


def _over_a_tree(row: Tensor) -> Tensor:
    """Sums and maxima, up a binomial tree to rank 0 and down again: log2(N) waits either way, two messages per rank.

    gloo's own all_reduce and all_gather are rings of N. All ranks get rank 0's result, bit for bit.
    """
    # The group's own methods: those of torch.distributed take longer than a small message does.
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    mine = result = torch.stack((row, row))
    children, distance = [], 1
    while distance < ranks and not rank & distance:
        if rank + distance < ranks:
            children.append(rank + distance)
        distance *= 2
    parent = rank - distance

    # Receives are posted first, so that gloo sends at once, without asking whether it may.
    theirs = [torch.empty_like(mine) for _ in children]
    coming = [group.recv([tensor], child, _TAG) for tensor, child in zip(theirs, children, strict=True)]
    if rank > 0:
        result = torch.empty_like(mine)
        down = group.recv([result], parent, _TAG)
    for work, (their_sums, their_maxima) in zip(coming, theirs, strict=True):
        work.wait()
        mine[0].add_(their_sums)
        torch.maximum(mine[1], their_maxima, out=mine[1])
    if rank > 0:
        up = group.send([mine], parent, _TAG)
        down.wait()
        up.wait()
    for work in [group.send([result], child, _TAG) for child in reversed(children)]:
        work.wait()
    return result
