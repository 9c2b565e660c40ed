"""What each rank does for `submit.py doctor`: a matrix product, an all-reduce, and messages between pairs of hosts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workloads.base import RunContext, WorkloadError, to_json
from workloads.doctor import Config
from workloads.doctor.rounds import rounds
from workloads.training.collectives import gather_objects
from workloads.whole_files import write_text

MOST_ROUNDS, MOST_AGAIN, TIMES_AGAIN = 8, 8, 3
DOUBTFUL = 0.7
FIRST_BYTES = 1 << 16
MOST_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""The largest message; a slow link never gets there, because sizes grow only while a message takes less than LONG_S."""
LONG_S = 0.1


def run(config: Config, ctx: RunContext) -> dict[str, Any]:
    """Measures, one thing after the other.

    Returns:
        On rank 0: `ranks`, each with host, device and tflops; `all_reduce`, with bytes and seconds; `links`, each with
        a pair of hosts, their names, and MB/s in either direction; some pairs twice.
    """
    measured: dict[str, Any] = {"ranks": [], "all_reduce": None, "links": []}

    def keep() -> None:
        if ctx.rank == 0:
            write_text(Path(config.folder) / "measured.json", json.dumps(to_json(measured)) + "\n")

    ctx.phase("matmul")
    device = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "CPU"
    mine = {"host": ctx.host, "local_rank": ctx.local_rank, "device": device, "tflops": tflops(ctx.device)}
    measured["ranks"] = gather_objects(mine, ctx.cpu_group) or []
    keep()
    ctx.phase("links")
    for pairs in rounds(ctx.shape.nodes, MOST_ROUNDS):
        measured["links"] += links(pairs, ctx)
        keep()
    # Those that look slow again, each alone: others may have been in their way.
    doubtful: list[Any] = [slow(measured["links"])]
    dist.broadcast_object_list(doubtful, 0, group=ctx.cpu_group)
    for pair in doubtful[0] * TIMES_AGAIN:
        measured["links"] += links([pair], ctx)
    keep()
    ctx.phase("all_reduce")
    if ctx.world_size > 1:
        measured["all_reduce"] = all_reduce(ctx.device)
    keep()
    return measured


def tflops(device: torch.device) -> float:
    """The rate of this rank's matrix product, in 10^12 operations per second: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    n, dtype, seconds = (8192, torch.bfloat16, 1.0) if on_gpu else (1024, torch.float32, 0.3)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    at_once = 10 if on_gpu else 1
    best, end = float("inf"), time.perf_counter() + seconds
    for turn in range(1000):
        began = time.perf_counter()
        for _ in range(at_once):
            a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        took = (time.perf_counter() - began) / at_once
        best = min(best, took) if turn else best  # the first one warms up
        if turn and time.perf_counter() > end:
            break
    return 2 * n**3 / best / 1e12


def all_reduce(device: torch.device) -> dict[str, float]:
    """The largest all-reduce over all ranks that does not take long, by its slowest rank."""
    size, best = FIRST_BYTES, {}
    while True:
        buffer = torch.zeros(size // 4, device=device)
        took = torch.full((1,), float("inf"), device=device)
        for _ in range(3):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(buffer)
            _wait(device)
            took.clamp_(max=time.perf_counter() - began)
        dist.all_reduce(took, dist.ReduceOp.MAX)  # all ranks must agree whether there is another one
        best = {"bytes": size, "seconds": took.item()}
        if size >= MOST_BYTES[device.type] or best["seconds"] > LONG_S:
            return best
        size *= 8


def links(pairs: Sequence[tuple[int, int]], ctx: RunContext) -> list[dict[str, Any]]:
    """What pairs of hosts have measured at the same time, on rank 0; all ranks call it."""
    pair = next((pair for pair in pairs if ctx.node_rank in pair), None)
    found = link(pair, ctx) if pair is not None and ctx.local_rank == 0 else None
    return [one for one in gather_objects(found, ctx.cpu_group) or [] if one is not None]


def slow(found: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Pairs that are clearly slower than the fastest; of many those that come closest to it, which may be as fast."""
    by_rate = sorted(((min(one["mb_s"]), one["pair"]) for one in found), reverse=True)
    return [pair for rate, pair in by_rate if rate < DOUBTFUL * by_rate[0][0]][:MOST_AGAIN]


def link(pair: tuple[int, int], ctx: RunContext) -> dict[str, Any] | None:
    """The rates of a pair's link, by the first ranks of two hosts; returned on the first of them.

    Raises:
        WorkloadError: there was no answer; names both.
    """
    (low, high), local = pair, ctx.local_world_size
    peer = (high if ctx.node_rank == low else low) * local
    names = (ctx.hosts[low * local], ctx.hosts[high * local])
    try:
        if ctx.node_rank == low:
            there = _send(peer, ctx.device)
            back = _receive(peer, ctx.device)
            return {"pair": pair, "hosts": names, "mb_s": (there / 1e6, back / 1e6)}
        _receive(peer, ctx.device)
        _send(peer, ctx.device)
    except RuntimeError as error:
        raise WorkloadError(f"the link between {names[0]} and {names[1]} does not work: {error}") from error
    return None


def _send(peer: int, device: torch.device) -> float:
    """Sends ever larger messages, each of which the peer confirms; the best rate in bytes per second."""
    best, took, size = 0.0, 0.0, FIRST_BYTES
    head = torch.zeros(1, dtype=torch.float64, device=device)
    while took < LONG_S and size <= MOST_BYTES[device.type]:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        for _ in range(3):
            dist.send(head.fill_(size), peer)
            _wait(device)
            began = time.perf_counter()
            dist.send(buffer, peer)
            dist.recv(head, peer)
            _wait(device)
            took = time.perf_counter() - began
            best = max(best, size / took)
            if took > LONG_S:
                break
        size *= 8
    dist.send(head.fill_(0), peer)
    dist.send(head.fill_(best), peer)
    return best


def _receive(peer: int, device: torch.device) -> float:
    """Confirms the peer's messages; the rate that it has measured."""
    head = torch.zeros(1, dtype=torch.float64, device=device)
    while True:
        dist.recv(head, peer)
        size = int(head.item())
        if not size:
            dist.recv(head, peer)
            return head.item()
        dist.recv(torch.empty(size, dtype=torch.uint8, device=device), peer)
        dist.send(head, peer)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
