"""One zero for the clocks of all ranks, whose own zeros have nothing to do with each other on different hosts."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

ROUNDS = 10


def common_zero(group: dist.ProcessGroup, device: torch.device) -> float:
    """What `time.perf_counter()` showed on this rank at one moment that is the same for all ranks of the group.

    Rank 0 asks each other rank for its time, several times, and takes the quickest answer: it was given half-way
    between question and return, to within half of what that took (Cristian 1989, "Probabilistic clock
    synchronization"): some 0.1 ms over gloo within a host, also where ranks outnumber the cores. (From a barrier, ranks
    that wait for a core come 20 ms apart.) All ranks call it at once; they leave it together, by a barrier.

    Returns:
        Seconds; subtracted from a later perf_counter, the time since that moment.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    zero = time.perf_counter_ns()
    message = torch.zeros((), dtype=torch.int64, device=device)
    for other in range(1, ranks):
        if rank == 0:
            answers = []
            for _ in range(ROUNDS):
                asked = time.perf_counter_ns()
                dist.send(message, group=group, group_dst=other)
                dist.recv(message, group=group, group_src=other)
                there, back = int(message.item()), time.perf_counter_ns()
                answers.append((back - asked, there - (asked + back) // 2))
            message.fill_(zero + min(answers)[1])
            dist.send(message, group=group, group_dst=other)
        elif rank == other:
            for _ in range(ROUNDS):
                dist.recv(message, group=group, group_src=0)
                message.fill_(time.perf_counter_ns())
                dist.send(message, group=group, group_dst=0)
            dist.recv(message, group=group, group_src=0)
            zero = int(message.item())
    dist.barrier(group)
    return zero / 1e9
