"""One zero for the clocks of all ranks, whose own zeros have nothing to do with each other on different hosts."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from workloads.training.collectives import all_gather

ROUNDS = 10


def common_zero(group: dist.ProcessGroup, device: torch.device) -> float:
    """What `time.perf_counter()` showed on this rank at one moment that is the same for all ranks of the group.

    If all ranks read one clock, as the processes of one Linux host do, that is what rank 0's showed: exact. Otherwise
    rank 0 asks each other rank for its time, several times, and takes the quickest answer: it was given half-way
    between question and return, to within half of what that took (Cristian 1989, "Probabilistic clock
    synchronization"). All ranks call it at once; they leave it together, by a barrier.

    Returns:
        Seconds; subtracted from a later perf_counter, the time since that moment.
    """
    zero = torch.tensor(time.perf_counter_ns(), device=device)
    mine = torch.tensor(identity(), device=device)
    if len({int(one.item()) for one in all_gather(mine, group)}) == 1:
        dist.broadcast(zero, group=group, group_src=0)
        shown = int(zero.item())
    else:
        shown = _asked(group, device)
    dist.barrier(group)
    return shown / 1e9


def identity() -> int:
    """A number, of 63 bits, that two processes have in common only if their perf_counter is one clock.

    On Linux it is CLOCK_MONOTONIC, which is the kernel's, shifted by the time namespace (time_namespaces(7), since
    Linux 5.6). Where neither can be read, each process has a number of its own.
    """
    try:
        words = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = Path("/proc/self/ns/time")
        if namespace.exists():
            words += str(namespace.stat().st_ino)
        number = hashlib.sha256(words.encode()).digest()
    except OSError:
        number = os.urandom(8)
    return int.from_bytes(number[:8], "big") >> 1


def _asked(group: dist.ProcessGroup, device: torch.device) -> int:
    """The zero in this rank's nanoseconds, by questions and answers."""
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
                message.item()  # over NCCL only the stream has waited so far
                message.fill_(time.perf_counter_ns())
                dist.send(message, group=group, group_dst=0)
            dist.recv(message, group=group, group_src=0)
            zero = int(message.item())
    return zero
