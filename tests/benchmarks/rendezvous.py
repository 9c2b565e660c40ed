"""How long N ranks take to meet, against a bare TCPStore with a counter and a go key.

Thousands of clients are threads of a few processes: each runs the real `rendezvous.join`, to the end. Two ways: rank 0
opens the store and announces it in a file; or a store waits already, as where an agent started the ranks.

    python -m tests.benchmarks rendezvous
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from jobs.rank.identity import RankInfo
from jobs.spec import RESOLVER
from tests.benchmarks.rows import Row, ratio_of_neighbors

COUNTS = (64, 256, 1024, 4096)
PER_HOST = 8
PROCESSES = 64
ROUNDS = 3
AT_MOST = 1.5
DEADLINE_S = 60
"""For one meeting; only so that a hang ends."""

Way = Literal["bare", "announced", "store waits"]


def info(rank: int, hosts: tuple[str, ...], **more: Any) -> RankInfo:
    return RankInfo(
        "local", rank, len(hosts), rank % PER_HOST, PER_HOST, hosts[rank], "7", expected_hosts=hosts, **more
    )


def _meet(way: Way, ranks: range, count: int, port: int, announcement: Path) -> Callable[[int], Any]:
    """What each client does; it returns what a rank would keep."""
    import torch.distributed as dist

    from jobs.rank import rendezvous

    deadline = timedelta(seconds=DEADLINE_S)

    def bare(rank: int) -> Any:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=deadline, wait_for_workers=False)
        if store.add("count", 1) == count:
            store.set("go", "1")
        store.wait(["go"])
        return store

    def ours(rank: int) -> Any:
        return rendezvous.join(infos[rank], "cpu", announcement, DEADLINE_S, None)

    if way == "bare":
        return bare
    where = {} if way == "announced" else {"master_addr": "127.0.0.1", "master_port": port}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    hosts = tuple(f"node{rank // PER_HOST:04d}" for rank in range(count))
    infos = {rank: info(rank, hosts, **where) for rank in ranks}
    return ours


def _clients(end: Connection, way: Way, ranks: range, count: int, port: int, announcement: Path) -> None:
    """A process of clients: says when it is ready, begins when told to, and says when each had met the others."""
    # A real rank has an interpreter of its own. Here threads that wait for it would each ask for it 200 times a second,
    # and what hundreds of clients make would have the collector look through all of torch again and again.
    sys.setswitchinterval(1.0)
    gc.disable()
    meet = _meet(way, ranks, count, port, announcement)
    go, met, times, errors = threading.Event(), [], [], []

    def client(rank: int) -> None:
        go.wait()
        try:
            met.append(meet(rank))
            times.append(time.monotonic())
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            print(f"rank {rank}: {errors[-1]}", file=sys.stderr, flush=True)  # at once: the others now wait in vain

    threads = [threading.Thread(target=client, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    end.send("ready")
    end.recv()
    go.set()
    for thread in threads:
        thread.join()
    if way != "bare":
        assert errors or sorted(one.placement.rank for one in met) == list(ranks)
    end.send((max(times, default=0.0), errors))
    end.recv()
    os._exit(0)


def _store(end: Connection) -> None:
    """A store that waits already."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    end.send(store.port)
    end.recv()
    os._exit(0)


def measure(way: Way, count: int) -> float:
    """Seconds from the first client's beginning until the last has met the others."""
    # Rank 0 has a process of its own, as it has everywhere: in one with hundreds of threads its turn comes late.
    shares = [range(1), *(range(first, count, PROCESSES) for first in range(1, PROCESSES + 1))]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "jobs.rank.rendezvous"])
    ends: list[Connection] = []
    processes: list[Any] = []

    def start(target: Callable[..., None], *args: Any) -> Connection:
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=target, args=(theirs, *args), daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(mine)
        return mine

    def hear(end: Connection) -> Any:
        assert end.poll(DEADLINE_S), f"{way}, {count} ranks: no end after {DEADLINE_S} s"
        return end.recv()

    with tempfile.TemporaryDirectory() as folder:
        announcement = Path(folder) / "rendezvous.json"
        try:
            port = hear(start(_store))
            clients = [start(_clients, way, ranks, count, port, announcement) for ranks in shares]
            for end in clients:
                hear(end)
            clients[0].send("go")
            if way == "announced":  # as the bare store, too, is there before its clients
                while not announcement.exists():
                    time.sleep(0.001)
            began = time.monotonic()
            for end in clients[1:]:
                end.send("go")
            heard = [hear(end) for end in clients]
            for end in ends:
                end.send("leave")
        finally:
            for process in processes:
                process.join(10)
                process.kill()
                process.join()
    errors = [error for _, their in heard for error in their]
    assert not errors, f"{way}, {count} ranks: {len(errors)} did not meet: {errors[0]}"
    return max(last for last, _ in heard) - began


def main(counts: tuple[int, ...] = COUNTS, rounds: int = ROUNDS) -> list[Row]:
    # The fork server, and so all clients, have it: a burst of connections looks up names, which where DNS is slow is
    # all that is then measured. Ranks have it from their launcher (jobs/rank/direct.py).
    os.environ["RES_OPTIONS"] = RESOLVER
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a line per client whose name is not found
    ways: tuple[Way, ...] = ("announced", "store waits")
    rows, first = [], {}
    for count in counts:
        times: dict[Way, list[float]] = {"bare": [measure("bare", count)], "announced": [], "store waits": []}
        for _ in range(rounds):
            for way in ways:
                times[way].append(measure(way, count))
            times["bare"].append(measure("bare", count))
        for way in ways:
            ours, theirs = statistics.median(times[way]), statistics.median(times["bare"])
            first.setdefault(way, ours)
            rows.append(
                Row(
                    what=f"{count:,} ranks meet, {'rank 0 announces its store' if way == 'announced' else way}",
                    against="a bare TCPStore, a counter and a go key",
                    ratio=ratio_of_neighbors(times[way], times["bare"]),
                    at_most=AT_MOST,
                    detail=f"{ours:.2f} s against {theirs:.2f} s; {ours / first[way]:.1f} times that of {counts[0]}",
                )
            )
    return rows
