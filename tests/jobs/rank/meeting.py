"""Ranks that meet as processes of their own, from a fork server."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jobs.errors import RendezvousError, TopologyError
from jobs.rank.identity import RankInfo
from jobs.run_dir import write_json
from tests.fork_server import fork_server

DEADLINE_S = 60
"""For a whole meeting; only so that a hang fails."""


def info(rank: int, hosts: Sequence[str], job_id: str = "7", attempt: int = 0, **more: Any) -> RankInfo:
    """Rank `rank` of a world with these hosts, as the scheduler numbers them."""
    host = hosts[rank]
    return RankInfo(
        launcher="local",
        rank=rank,
        world_size=len(hosts),
        local_rank=list(hosts[:rank]).count(host),
        local_world_size=list(hosts).count(host),
        host=host,
        job_id=job_id,
        attempt=attempt,
        **{"expected_hosts": tuple(hosts), **more},
    )


@dataclasses.dataclass
class Came:
    """What one rank came to: its placement and the sum that its group computed, or the error."""

    placement: dict[str, Any] | None
    total: float | None
    error: str
    kind: str
    seconds: float


def prepare_rank() -> None:
    """What jobs/rank/run.py does before a rank meets the others."""
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"


Ports = tuple[int, int]


def rank_process(
    end: Connection,
    me: RankInfo,
    announcement: Path,
    timeout_s: float,
    value: float,
    pause_s: float,
    ports: Ports | None,
) -> None:
    import torch
    import torch.distributed as dist

    from jobs.rank import rendezvous

    prepare_rank()
    time.sleep(pause_s)
    began = time.monotonic()
    try:
        meeting = rendezvous.join(me, "cpu", announcement, timeout_s, None, ports)
        rendezvous.init_process_group(meeting, torch.device("cpu"), "gloo", 30)
        total = torch.tensor([value])
        dist.all_reduce(total)
        meeting.finish(30)
        came = Came(dataclasses.asdict(meeting.placement), total.item(), "", "", time.monotonic() - began)
    except (RendezvousError, TopologyError) as error:
        came = Came(None, None, str(error), type(error).__name__, time.monotonic() - began)
    end.send(came)
    end.close()
    os._exit(0)


class Meeting:
    """Ranks in processes of their own, from a fork server."""

    def __init__(self) -> None:
        self.context = fork_server()
        self.processes: list[Any] = []

    def start(self, target: Any, *args: Any) -> Connection:
        mine, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        return mine

    def come(
        self,
        infos: Sequence[RankInfo],
        announcement: Path,
        timeout_s: float = 30,
        value: float = 1.0,
        pauses: Sequence[float] = (),
        ports: Ports | None = None,
    ) -> list[Connection]:
        late = [*pauses, *[0.0] * len(infos)]
        return [
            self.start(rank_process, me, announcement, timeout_s, value, late[i], ports) for i, me in enumerate(infos)
        ]

    def results(self, ends: Sequence[Connection]) -> list[Any]:
        deadline = time.monotonic() + DEADLINE_S
        for end in ends:
            assert wait([end], timeout=max(0, deadline - time.monotonic())), "a rank has not come to an end"
        return [end.recv() for end in ends]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def announce(announcement: Path, port: int, identity: str = "7-0", nonce: str = "n0") -> None:
    """What rank 0 on host a said before its port went to somebody else."""
    said = {"address": "127.0.0.1", "port": port, "identity": identity, "nonce": nonce, "host": "a"}
    write_json(announcement, said)


def port_of(announcement: Path) -> int:
    """Where rank 0 listens, once it has said so."""
    end = time.monotonic() + DEADLINE_S
    while not announcement.exists():
        assert time.monotonic() < end, "rank 0 has not announced itself"
        time.sleep(0.02)
    return int(json.loads(announcement.read_text())["port"])


def store_process(end: Connection, owner: str) -> None:
    """A store of torch's, of whomever."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if owner:
        store.set("meshrun/owner", owner)
    end.send(store.port)
    time.sleep(600)
