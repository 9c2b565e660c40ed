"""The ranks of one job find each other and nobody else's; who does not come is named, to everyone, in time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import RendezvousError, TopologyError
from jobs.records import write_json
from jobs.topology import RankInfo
from workloads.base import MeshSpec

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

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
        expected_hosts=tuple(hosts),
        **more,
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
    """What jobs/job.py does before a rank meets the others."""
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"


def _rank(end: Connection, me: RankInfo, announcement: Path, timeout_s: float, value: float, pause_s: float) -> None:
    import torch
    import torch.distributed as dist

    from jobs import rendezvous

    prepare_rank()
    time.sleep(pause_s)
    began = time.monotonic()
    try:
        meeting = rendezvous.join(me, "cpu", announcement, timeout_s, None)
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
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch.distributed"])
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
    ) -> list[Connection]:
        late = [*pauses, *[0.0] * len(infos)]
        return [self.start(_rank, me, announcement, timeout_s, value, late[i]) for i, me in enumerate(infos)]

    def results(self, ends: Sequence[Connection]) -> list[Any]:
        deadline = time.monotonic() + DEADLINE_S
        for end in ends:
            assert wait([end], timeout=max(0, deadline - time.monotonic())), "a rank has not come to an end"
        return [end.recv() for end in ends]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def meeting() -> Any:
    made = Meeting()
    yield made
    made.end()


def test_all_come(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "a", "b", "b"]
    ends = meeting.come([info(r, hosts) for r in range(4)], tmp_path / "r.json", pauses=[0.5, 0, 0, 1])
    came = meeting.results(ends)
    assert [c.error for c in came] == [""] * 4
    assert [c.total for c in came] == [4.0] * 4
    assert [c.placement["rank"] for c in came] == [0, 1, 2, 3]
    assert came[3].placement == {
        "rank": 3,
        "world_size": 4,
        "local_rank": 1,
        "local_world_size": 2,
        "node_rank": 1,
        "nodes": 2,
        "hosts": tuple(hosts),
        "scheduler_rank": 3,
    }


def test_cyclic_ranks_are_renumbered_host_by_host(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "b", "a", "b"]
    came = meeting.results(meeting.come([info(r, hosts) for r in range(4)], tmp_path / "r.json"))
    assert [c.placement["rank"] for c in came] == [0, 2, 1, 3]
    assert {c.placement["hosts"] for c in came} == {("a", "a", "b", "b")}
    assert [c.total for c in came] == [4.0] * 4


def test_a_missing_rank_is_named_alike_to_all_who_came(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "a", "b", "b"]
    ends = meeting.come([info(r, hosts) for r in (0, 1, 3)], tmp_path / "r.json", timeout_s=3)
    came = meeting.results(ends)
    assert {c.kind for c in came} == {"RendezvousError"}
    assert {c.error for c in came} == {
        "3 of 4 ranks came within 3 s; missing: rank 2 on b; present: a: ranks 0 1; b: rank 3"
    }
    assert all(c.seconds < 20 for c in came)


def test_a_missing_rank_0_is_named(meeting: Meeting, tmp_path: Path) -> None:
    ends = meeting.come([info(r, ["a", "b"]) for r in (1,)], tmp_path / "r.json", timeout_s=2)
    (came,) = meeting.results(ends)
    assert came.kind == "RendezvousError"
    assert "missing: rank 0 on a, which has not announced itself within 2 s" in came.error
    assert str(tmp_path / "r.json") in came.error
    assert came.seconds < 20


def test_unequal_hosts_are_refused_with_the_table_on_all_ranks(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "a", "a", "b"]
    came = meeting.results(meeting.come([info(r, hosts) for r in range(4)], tmp_path / "r.json"))
    assert {c.kind for c in came} == {"TopologyError"}
    assert len({c.error for c in came}) == 1
    assert "a: ranks 0 1 2; b: rank 3" in came[0].error


def test_two_jobs_at_once_do_not_mix(meeting: Meeting, tmp_path: Path) -> None:
    infos = {job: [info(r, ["a", "a"], job_id=job) for r in range(2)] for job in ("1", "2")}
    ends = []
    for order in (0, 1):  # rank 0 of both, then rank 1 of both
        for job, value in (("1", 1.0), ("2", 10.0)):
            (tmp_path / job).mkdir(exist_ok=True)
            ends += meeting.come([infos[job][order]], tmp_path / job / "r.json", value=value)
    assert [c.total for c in meeting.results(ends)] == [2.0, 20.0, 2.0, 20.0]


@pytest.mark.parametrize("stale", [{"job_id": "6"}, {"attempt": 1}], ids=["another job's", "another attempt's"])
def test_a_stale_announcement_is_ignored(meeting: Meeting, tmp_path: Path, stale: dict[str, Any]) -> None:
    announcement = tmp_path / "r.json"
    other = info(0, ["a", "a"], **stale)
    with socket.create_server(("127.0.0.1", 0)) as somebody_else:
        port = somebody_else.getsockname()[1]
        identity = f"{other.job_id}-{other.attempt}"
        write_json(announcement, {"address": "127.0.0.1", "port": port, "identity": identity, "host": "a"})
        ends = meeting.come([info(r, ["a", "a"]) for r in range(2)], announcement, pauses=[1.5, 0])
        assert [c.total for c in meeting.results(ends)] == [2.0, 2.0]
    assert json.loads(announcement.read_text())["identity"] == "7-0"


def test_an_address_where_nobody_listens_is_named(meeting: Meeting, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    write_json(tmp_path / "r.json", {"address": "127.0.0.1", "port": port, "identity": "7-0", "host": "a"})
    (came,) = meeting.results(meeting.come([info(1, ["a", "b"])], tmp_path / "r.json", timeout_s=2))
    assert came.kind == "RendezvousError"
    assert f"rank 0 announced 127.0.0.1:{port} on a, and it cannot be reached" in came.error


def _dies_at_its_seat(end: Connection, me: RankInfo, announcement: Path) -> None:
    from jobs import rendezvous

    def die(me: RankInfo, store: Any, *_: object) -> None:
        while not store.check(["seat/1"]):
            time.sleep(0.05)
        time.sleep(0.5)
        os._exit(0)

    rendezvous._seat_everyone = die  # type: ignore[assignment]
    rendezvous.join(me, "cpu", announcement, 30, None)


def test_a_rank_0_that_dies_while_they_wait_is_said_to_be_gone(meeting: Meeting, tmp_path: Path) -> None:
    ends = meeting.come([info(1, ["a", "b"])], tmp_path / "r.json", timeout_s=30)
    meeting.start(_dies_at_its_seat, info(0, ["a", "b"]), tmp_path / "r.json")
    (came,) = meeting.results(ends)
    assert came.kind == "RendezvousError"
    assert came.error == "rank 0 on a went away during rendezvous"
    assert came.seconds < 20


# --- addresses --------------------------------------------------------------------------------------------------------


def test_addresses_of_interfaces() -> None:
    from jobs.rendezvous import gloo_interface, interface_address, own_address

    assert interface_address("lo") == "127.0.0.1"
    assert interface_address("nothere0") is None
    assert own_address(info(0, ["a"]), None) == "127.0.0.1"
    assert gloo_interface(info(0, ["a"]), None) == "lo"
    assert gloo_interface(info(0, ["a"]), "ib0") == "ib0"
    with pytest.raises(TopologyError, match=r"interface 'nothere0' has no IPv4 address on a \(it has: .*lo"):
        own_address(info(0, ["a"]), "nothere0")


# --- the mesh's own groups --------------------------------------------------------------------------------------------


def _reduce_along(
    end: Connection, me: RankInfo, announcement: Path, spec: MeshSpec, dimension: str, silent: bool, timeout_s: float
) -> None:
    import torch
    import torch.distributed as dist

    from jobs import rendezvous
    from jobs.mesh import build_mesh

    prepare_rank()
    meeting = rendezvous.join(me, "cpu", announcement, 30, None)
    rendezvous.init_process_group(meeting, torch.device("cpu"), "gloo", 600)
    mesh = build_mesh(spec, "cpu", timedelta(seconds=timeout_s))
    group = mesh.get_group(dimension)
    value = torch.ones(1)
    dist.all_reduce(value, group=group)
    began = time.monotonic()
    error = ""
    if silent:
        time.sleep(600)
    try:
        dist.all_reduce(value, group=group)
    except RuntimeError as failure:
        error = str(failure)
    end.send((mesh.mesh.tolist(), dist.get_process_group_ranks(group), error, time.monotonic() - began))
    os._exit(0)


@pytest.mark.parametrize(
    ("spec", "dimension"),
    [(MeshSpec(("dp",), (2,)), "dp"), (MeshSpec(("dp", "tp"), (2, 1)), "dp"), (MeshSpec(("dp", "tp"), (1, 2)), "tp")],
    ids=str,
)
def test_a_silent_peer_fails_a_meshs_collective_in_time(
    meeting: Meeting, tmp_path: Path, spec: MeshSpec, dimension: str
) -> None:
    ends = [
        meeting.start(_reduce_along, info(r, ["a", "b"]), tmp_path / "r.json", spec, dimension, r == 1, 2.0)
        for r in range(2)
    ]
    ((_, ranks, error, seconds),) = meeting.results(ends[:1])
    assert ranks == [0, 1]
    assert error
    assert seconds < 20


def test_the_mesh_is_in_plain_order_also_under_cyclic_distribution(meeting: Meeting, tmp_path: Path) -> None:
    hosts, spec = ["a", "b", "a", "b"], MeshSpec(("dp", "tp"), (2, 2))
    ends = [
        meeting.start(_reduce_along, info(r, hosts), tmp_path / "r.json", spec, "tp", False, 30.0) for r in range(4)
    ]
    came = meeting.results(ends)
    assert [c[2] for c in came] == [""] * 4
    assert {str(c[0]) for c in came} == {"[[0, 1], [2, 3]]"}
    # The scheduler's ranks 0 and 2 share host a, 1 and 3 host b: each pair is one tp group.
    assert [c[1] for c in came] == [[0, 1], [2, 3], [0, 1], [2, 3]]
