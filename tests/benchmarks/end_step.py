"""What it takes to end a step on many ranks over gloo, against gathering every rank's row on every rank.

The ranks are processes of this machine, so that each waits for its turn on a core more than for a message. What is
compared is therefore CPU time, all ranks' together, by which the ranks delay each other; real hosts would also pay for
each message that has to come before the next one is sent, of which there are 2 log2(N) instead of N - 1.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from tests.benchmarks.rows import Row, ratio_of_neighbors
from workloads.base import RunContext, RunPaths, largest, mean

RANKS = (16, 64, 256)
STEPS = 4
"""Per turn."""
TURNS = 3
AT_MOST = 0.2


def main() -> list[Row]:
    took = {ranks: _measure(ranks) for ranks in RANKS}
    rows = [
        Row(
            what=f"end_step on {ranks} ranks, CPU time",
            against="all_gather of rows",
            ratio=ratio_of_neighbors(ours, gathered),
            at_most=AT_MOST,
            detail=f"{_ms(ours)} against {_ms(gathered)} per rank",
        )
        for ranks, (ours, gathered) in took.items()
        if ranks >= 64
    ]
    few, many = RANKS[-2:]
    growth = statistics.median(took[many][0]) / statistics.median(took[few][0])
    logarithms = math.log2(many) / math.log2(few)
    return [
        *rows,
        Row(
            what=f"end_step's growth from {few} to {many} ranks",
            against="log2 of the ranks",
            ratio=growth / logarithms,
            at_most=1.0,
            detail=f"x {growth:.2f} against x {logarithms:.2f}",
        ),
    ]


def _ms(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.2f} ms"


def _measure(ranks: int) -> tuple[list[float], list[float]]:
    """CPU seconds a step and rank: of our turns, and of those that gather, which are one more."""
    import torch

    torch.set_num_threads(1)  # before forking
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(theirs, rank, ranks, Path(folder)), daemon=True)
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        try:
            by_rank = [end.recv() for end in ends]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
    turns = [statistics.mean(turn) for turn in zip(*by_rank, strict=True)]
    return turns[1::2], turns[::2]


def _rank_main(end: Connection, rank: int, ranks: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    # Loopback's name is looked up for each connection, which a slow name server would make minutes of.
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    store = _store(rank, ranks, folder)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    names = ("metrics.jsonl", "data", "export", "checkpoints", "attempt-0")
    ctx = RunContext(
        *(rank, ranks, 0, 1, rank, tuple(f"host{r}" for r in range(ranks))),
        device=torch.device("cpu"),
        mesh=None,  # type: ignore[arg-type]
        paths=RunPaths(folder, *(folder / name for name in names)),
    )

    def ours(step: int) -> None:
        ctx.end_step({"step": step, "loss": mean(float(rank), finite=True), "memory": largest(rank), "lr": 0.1})

    def gathered(step: int) -> None:
        _gather(rank, ranks, float(rank), folder / "gathered.jsonl")

    _seconds(ours), _seconds(gathered)  # connects
    turns = [_seconds(gathered)]
    for _ in range(TURNS):
        turns += [_seconds(ours), _seconds(gathered)]
    end.send(turns)
    dist.barrier()
    time.sleep(3600)  # until it is killed: no rank leaves while another reads


def _store(rank: int, ranks: int, folder: Path) -> object:
    import torch.distributed as dist

    address = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        (folder / "port.partial").write_text(str(store.port))
        (folder / "port.partial").rename(address)
        return store
    while not address.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(address.read_text()), ranks, is_master=False)


def _seconds(end_step: Callable[[int], None]) -> float:
    began = time.process_time()
    for step in range(STEPS):
        end_step(step)
    return (time.process_time() - began) / STEPS


def _gather(rank: int, ranks: int, loss: float, metrics: Path) -> None:
    """What end_step did before: every rank gathers all rows, and reduces them by itself."""
    import torch
    import torch.distributed as dist

    names = float(zlib.crc32(b"loss\0memory"))
    row = torch.tensor([names, 0.0, loss, float(rank), *[0.0] * 28], dtype=torch.float64)
    rows = [torch.empty_like(row) for _ in range(ranks)]
    dist.all_gather(rows, row)
    by_rank = [r.tolist() for r in rows]
    assert all(row[0] == names for row in by_rank)
    assert all(math.isfinite(row[2]) for row in by_rank)
    values = (math.fsum(row[2] for row in by_rank) / ranks, max(row[3] for row in by_rank))
    if rank == 0:
        with metrics.open("a") as file:
            file.write(f"{values}\n")


if __name__ == "__main__":
    for row in main():
        print(f"{row['what']} against {row['against']}: {row['ratio']:.3f} (at most {row['at_most']}); {row['detail']}")
    sys.exit(0)
