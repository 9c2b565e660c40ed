"""How long the N ranks of a job take to meet, against a bare TCPStore with a counter and a go key.

As where agents start the ranks: each host's agent meets the other agents at the leader, and then its ranks meet in the
store that the leader has opened. Agents and ranks are threads of a few processes: each agent runs the real meeting and
each rank the real `check_in`, to the end.

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
from typing import Any, Literal, NamedTuple

from jobs.rank.identity import RankInfo
from jobs.run_dir import RunDirectory
from jobs.spec import RESOLVER, JobSpec, ResourceSpec
from tests.benchmarks.rows import Row, ratio_of_neighbors

COUNTS = (64, 256, 1024, 4096)
PER_HOST = 8
PROCESSES = 64
ROUNDS = 3
AT_MOST = 1.5
DEADLINE_S = 60
"""For one meeting; only so that a hang ends."""

Way = Literal["bare", "ours"]


class Took(NamedTuple):
    """Seconds from the first client's beginning."""

    agents: float
    """Until the last agent had met the others; in the bare way, where there are none, until all could begin."""
    ranks: float
    """Until the last rank had."""


def _clients(end: Connection, way: Way, hosts: range, count: int, port: int, run_dir: Path) -> None:
    """A process of some hosts: says when it is ready, begins when told to, and says when its agents and ranks met."""
    import torch.distributed as dist

    from jobs.agent.meeting import Gathering, Joining, Met
    from jobs.rank import rendezvous

    # A real rank has an interpreter of its own. Here threads that wait for it would each ask for it 200 times a second,
    # and what hundreds of clients make would have the collector look through all of torch again and again.
    sys.setswitchinterval(1.0)
    gc.disable()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    names = tuple(f"node{host:04d}" for host in range(count // PER_HOST))
    host_of_rank = tuple(name for name in names for _ in range(PER_HOST))
    go, started = threading.Event(), {host: threading.Event() for host in hosts}
    agents: dict[int, Met] = {}
    kept: list[Any] = []
    times: dict[str, list[float]] = {"agent": [], "rank": []}
    errors: list[str] = []
    attempt = RunDirectory(run_dir).attempt(0)
    spec = JobSpec(
        workload="none", settings={}, executor="local", cluster="none", run_dir=run_dir,
        resources=ResourceSpec(nodes=len(names), gpus_per_node=PER_HOST), rendezvous_timeout_s=DEADLINE_S,
    )  # fmt: skip

    def agent(host: int) -> None:
        go.wait()
        if way == "ours":
            me = RankInfo("local", host, len(names), 0, 1, names[host], "7", expected_hosts=names, noun="agent")
            meeting = Joining(me, spec, attempt) if host else Gathering(me, spec, attempt, "")
            kept.append(meeting)
            while (met := meeting.look()) is None:
                meeting.wait(1.0)  # a real agent looks more often, and has a CPU of its own for that
            agents[host] = met
        started[host].set()

    def rank(number: int) -> None:
        host = number // PER_HOST
        started[host].wait()
        kept.append(bare() if way == "bare" else ours(number, host))

    def ours(number: int, host: int) -> Any:
        agent = agents[host]
        me = RankInfo(
            "local", number, count, number % PER_HOST, PER_HOST, names[host], "7", node_rank=host,
            expected_hosts=host_of_rank, master_addr=agent.address, master_port=agent.port, has_agent=True,
        )  # fmt: skip
        met = rendezvous.check_in(me, "cpu", DEADLINE_S, None)
        assert (met.placement.rank, met.placement.hosts) == (number, host_of_rank)
        return met

    def bare() -> Any:
        deadline = timedelta(seconds=DEADLINE_S)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=deadline, wait_for_workers=False)
        if store.add("count", 1) == count:
            store.set("go", "1")
        store.wait(["go"])
        return store

    def client(meet: Callable[[int], None], noun: str, number: int) -> None:
        try:
            meet(number)
            times[noun].append(time.monotonic())
        except Exception as error:
            errors.append(f"{noun} {number}: {type(error).__name__}: {error}")
            print(errors[-1], file=sys.stderr, flush=True)  # at once: the others now wait in vain

    ranks = [rank for host in hosts for rank in range(host * PER_HOST, (host + 1) * PER_HOST)]
    threads = [threading.Thread(target=client, args=(agent, "agent", host), daemon=True) for host in hosts]
    threads += [threading.Thread(target=client, args=(rank, "rank", number), daemon=True) for number in ranks]
    for thread in threads:
        thread.start()
    end.send("ready")
    end.recv()
    go.set()
    for thread in threads:
        thread.join()
    end.send((Took(*(max(times[noun], default=0.0) for noun in ("agent", "rank"))), errors))
    end.recv()
    os._exit(0)


def _store(end: Connection) -> None:
    """The bare one."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    end.send(store.port)
    end.recv()
    os._exit(0)


def measure(way: Way, count: int) -> Took:
    """From when the store is there and the clients are told to begin."""
    # The first host, with the store, has a process of its own: in one with hundreds of threads its turn comes late.
    hosts = count // PER_HOST
    shares = [range(1), *(range(first, hosts, PROCESSES) for first in range(1, min(hosts, PROCESSES + 1)))]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "jobs.rank.rendezvous", "jobs.agent.meeting"])
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
        run_dir = Path(folder)
        announcement = RunDirectory(run_dir).attempt(0).make().rendezvous
        try:
            port = hear(start(_store))
            clients = [start(_clients, way, mine, count, port, run_dir) for mine in shares]
            for end in clients:
                hear(end)
            clients[0].send("go")
            if way == "ours":  # as the bare store, too, is there before its clients
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
    return Took(max(took.agents for took, _ in heard) - began, max(took.ranks for took, _ in heard) - began)


def main(counts: tuple[int, ...] = COUNTS, rounds: int = ROUNDS) -> list[Row]:
    # The fork server, and so all clients, have it: a burst of connections looks up names, which where DNS is slow is
    # all that is then measured. Ranks have it from their launcher (jobs/rank/direct.py).
    os.environ["RES_OPTIONS"] = RESOLVER
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a line per client whose name is not found
    rows: list[Row] = []
    first_s = 0.0
    for count in counts:
        bare, ours = [measure("bare", count).ranks], []
        for _ in range(rounds):
            ours.append(measure("ours", count))
            bare.append(measure("bare", count).ranks)
        agents_s, ranks_s = (statistics.median(times) for times in zip(*ours, strict=True))
        first_s = first_s or ranks_s
        rows.append(
            Row(
                what=f"{count // PER_HOST:,} agents, then their {count:,} ranks meet",
                against="a bare TCPStore, a counter and a go key",
                ratio=ratio_of_neighbors([took.ranks for took in ours], bare),
                at_most=AT_MOST,
                detail=f"{ranks_s:.2f} s (the agents {agents_s:.2f} s) against {statistics.median(bare):.2f} s; "
                f"{ranks_s / first_s:.1f} times that of {counts[0]}",
            )
        )
    return rows
