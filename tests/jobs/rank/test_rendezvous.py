"""The ranks of one job meet and are numbered; ranks that do not come are named, to everyone, in time."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import RendezvousError, TopologyError
from jobs.rank.identity import RankInfo
from tests.jobs.rank.meeting import Meeting, info, prepare_rank, rank_process, store_process

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


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
    }


def test_cyclic_ranks_are_renumbered_host_by_host(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "b", "a", "b"]
    came = meeting.results(meeting.come([info(r, hosts) for r in range(4)], tmp_path / "r.json"))
    assert [c.placement["rank"] for c in came] == [0, 2, 1, 3]
    assert {c.placement["hosts"] for c in came} == {("a", "a", "b", "b")}
    assert [c.total for c in came] == [4.0] * 4


def test_a_missing_rank_is_named_alike_to_all_who_came(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "a", "b", "b"]
    ends = meeting.come([info(r, hosts) for r in (0, 1, 3)], tmp_path / "r.json", timeout_s=6)
    came = meeting.results(ends)
    assert {c.kind for c in came} == {"RendezvousError"}
    assert {c.error for c in came} == {
        "3 of 4 ranks came within 6 s; missing: rank 2 on b; present: a: ranks 0 1; b: rank 3"
    }
    assert all(c.seconds < 20 for c in came)


def test_unequal_hosts_are_refused_with_the_table_on_all_ranks(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "a", "a", "b"]
    came = meeting.results(meeting.come([info(r, hosts) for r in range(4)], tmp_path / "r.json"))
    assert {c.kind for c in came} == {"TopologyError"}
    assert len({c.error for c in came}) == 1
    assert "a: ranks 0 1 2; b: rank 3" in came[0].error


def _with_gpu(end: Connection, me: RankInfo, announcement: Path, gpu: str) -> None:
    from jobs.rank import rendezvous

    prepare_rank()
    try:
        rendezvous.join(me, "cuda", announcement, 30, None, gpu=gpu)
    except TopologyError as error:
        end.send(str(error))
    os._exit(0)


def test_ranks_that_took_one_gpu_are_refused_on_all(meeting: Meeting, tmp_path: Path) -> None:
    """The GPU is a fake: no more than its name."""
    ends = [meeting.start(_with_gpu, info(r, ["a", "a"]), tmp_path / "r.json", "uuid-0") for r in range(2)]
    first, second = meeting.results(ends)
    assert first == second
    assert "ranks 0 1 on a: uuid-0" in first


def test_two_processes_that_are_the_same_rank_are_refused_on_all(meeting: Meeting, tmp_path: Path) -> None:
    """As where mpirun starts several in one rank; the fourth rank would never come."""
    hosts = ["a", "a", "b", "b"]
    infos = [info(0, hosts), info(1, hosts), dataclasses.replace(info(1, hosts), host="b"), info(2, hosts)]
    came = meeting.results(meeting.come(infos, tmp_path / "r.json", pauses=[0, 0, 1.5, 0], timeout_s=30))
    assert {c.kind for c in came} == {"RendezvousError"}
    assert {c.error for c in came} == {
        "two processes are rank 1, the first on a, the second on b; "
        "start every rank once, with submit.py, srun or torchrun, and without mpirun"
    }
    assert all(c.seconds < 20 for c in came)


def test_two_processes_that_are_rank_0_are_refused(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "b"]
    came = meeting.results(
        meeting.come([info(0, hosts), info(0, hosts)], tmp_path / "r.json", pauses=[0, 1], timeout_s=4)
    )
    assert came[0].error.startswith("two processes are rank 0, one on a; start every rank once")
    assert came[1].error.startswith("1 of 2 ranks came within 4 s; missing: rank 1")


def _finishes(end: Connection, me: RankInfo, announcement: Path) -> None:
    from jobs.rank import rendezvous

    prepare_rank()
    meeting = rendezvous.join(me, "cpu", announcement, 30, None)
    if me.rank == 2:
        time.sleep(600)
    try:
        meeting.finish(2)
        end.send("finished")
    except RendezvousError as error:
        end.send(str(error))
    os._exit(0)


def test_a_rank_that_does_not_finish_is_named(meeting: Meeting, tmp_path: Path) -> None:
    hosts = ["a", "a", "b", "b"]
    ends = [meeting.start(_finishes, info(r, hosts), tmp_path / "r.json") for r in range(4)]
    first, second, _, fourth = ends
    assert meeting.results([first]) == ["rank 0 is done, but after 2 s these are not: rank 2 on b"]
    assert meeting.results([second, fourth]) == ["finished", "finished"]


def _checks_in(end: Connection, me: RankInfo, device: str, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    from jobs.rank import rendezvous

    prepare_rank()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        meeting = rendezvous.check_in(me, device, timeout_s, None)
        rendezvous.init_process_group(meeting, torch.device("cpu"), "gloo", 30)
        total = torch.tensor([me.rank + 1])
        dist.all_reduce(total)
        end.send((total.item(), dataclasses.astuple(meeting.placement)))
        meeting.finish(30)
    except (RendezvousError, TopologyError) as error:
        end.send(f"{type(error).__name__}: {error}")
    os._exit(0)


def test_ranks_that_an_agent_has_started_only_check_in(meeting: Meeting) -> None:
    (port,) = meeting.results([meeting.start(store_process, "")])
    hosts = ["a", "a", "b", "b"]

    def check_in(job: str, ranks: Sequence[int], timeout_s: float = 30, device_of_2: str = "cpu") -> list[Connection]:
        more: dict[str, Any] = {"master_addr": "127.0.0.1", "master_port": port, "has_agent": True}
        infos = [info(r, hosts, job, node_rank=r // 2, **more) for r in ranks]
        return [meeting.start(_checks_in, me, device_of_2 if me.rank == 2 else "cpu", timeout_s) for me in infos]

    ends = [
        *check_in("1", [0, 1, 2, 3]),
        *check_in("2", [0, 1, 3], timeout_s=3)[:1],  # the others are ended by their agents
        *check_in("3", [1, 2, 3], timeout_s=3),
        *check_in("4", [0, 1, 2, 3], device_of_2="cuda")[:1],
    ]
    *all_four, of_missing, first, second, third, of_devices = meeting.results(ends)
    assert all_four == [(10, (r, 4, r % 2, 2, r // 2, 2, tuple(hosts))) for r in range(4)]
    assert of_missing == (
        "RendezvousError: 3 of 4 ranks came within 3 s; missing: rank 2 on b; present: a: ranks 0 1; b: rank 3"
    )
    assert {first, second, third} == {"RendezvousError: missing: rank 0 on a, which has not come within 3 s"}
    assert of_devices.startswith("TopologyError: some ranks have a GPU and others do not: rank 2 on b: cuda, ")


def _dies_at_its_seat(end: Connection, me: RankInfo, announcement: Path) -> None:
    from jobs.rank import rendezvous

    def die(me: RankInfo, store: Any, *_: object) -> None:
        while not store.check(["claims/1"]):
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


def _stops_at_its_seat(end: Connection, me: RankInfo, announcement: Path) -> None:
    from jobs.rank import rendezvous

    def stop(me: RankInfo, store: Any, *_: object) -> None:
        while not store.check(["claims/1"]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGSTOP)

    rendezvous._seat_everyone = stop  # type: ignore[assignment]
    rendezvous.join(me, "cpu", announcement, 30, None)


def _is_patient_for_a_second(end: Connection, me: RankInfo, announcement: Path) -> None:
    from jobs.rank import rendezvous

    rendezvous.GRACE_S = 1.0
    rank_process(end, me, announcement, 3, 1.0, 0, None)


def test_a_rank_0_that_was_stopped_keeps_nobody_waiting_for_ever(meeting: Meeting, tmp_path: Path) -> None:
    end = meeting.start(_is_patient_for_a_second, info(1, ["a", "b"]), tmp_path / "r.json")
    meeting.start(_stops_at_its_seat, info(0, ["a", "b"]), tmp_path / "r.json")
    (came,) = meeting.results([end])
    assert came.kind == "RendezvousError"
    assert came.error == "rank 0 on a has not answered within 4 s"
    assert came.seconds < 20


def _counts_sockets(end: Connection, me: RankInfo, announcement: Path, wanted: str | None) -> None:
    import torch
    import torch.distributed as dist

    from jobs.rank import rendezvous

    prepare_rank()
    os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
    if wanted is not None:
        os.environ["TORCH_GLOO_LAZY_INIT"] = wanted
    meeting = rendezvous.join(me, "cpu", announcement, 30, None)
    rendezvous.init_process_group(meeting, torch.device("cpu"), "gloo", 30)
    sockets = sum(path.is_socket() for path in Path("/proc/self/fd").iterdir())
    if meeting.store.add("counted", 1) == me.world_size:  # nobody talks before all have counted
        meeting.store.set("all counted", "")
    meeting.store.wait(["all counted"])
    dist.barrier()
    end.send(sockets)
    meeting.finish(30)
    os._exit(0)


@pytest.mark.parametrize("wanted", [None, "0"], ids=["by default", "as the user wants"])
def test_ranks_are_not_connected_with_all_others_before_they_talk(
    meeting: Meeting, tmp_path: Path, wanted: str | None
) -> None:
    hosts = ["a"] * 5
    ends = [meeting.start(_counts_sockets, info(r, hosts), tmp_path / "r.json", wanted) for r in range(5)]
    _, *others = meeting.results(ends)  # rank 0 has the store
    assert others == [2 if wanted is None else 6] * 4  # to the store, and what listens; with all, four more


def layout(order: str, nodes: int, per_node: int) -> list[Any]:
    """Seats as the scheduler numbers them, host-major."""
    from jobs.rank.numbering import Seat, number_by_host

    def node(rank: int) -> int:
        return rank // per_node if order == "block" else rank % nodes if order == "cyclic" else shuffled[rank] % nodes

    shuffled = list(range(nodes * per_node))
    random.Random(0).shuffle(shuffled)
    seats, seen = [], dict.fromkeys(range(nodes), 0)
    for rank in range(nodes * per_node):
        where = node(rank)
        seats.append(Seat(rank, f"gpu-node{where:05d}", seen[where], "cuda", f"GPU-{rank:032x}"))
        seen[where] += 1
    return number_by_host(seats)


@pytest.mark.parametrize("order", ["block", "cyclic", "arbitrary"])
def test_the_answer_that_every_rank_reads_is_small(order: str) -> None:
    from jobs.rank.numbering import place
    from jobs.rank.rendezvous import _order, _packed, _table, _unpacked

    for nodes in (1, 128, 512):
        seats = layout(order, nodes, 8)
        text = _packed(_table(seats))
        answer = _unpacked(text.encode())
        ranks = _order(answer)
        assert list(ranks) == [seat.rank for seat in seats]
        placements = [place(answer["hosts"].split(), ranks, ranks[position]) for position in (0, nodes * 8 - 1)]
        assert [placement.rank for placement in placements] == [0, nodes * 8 - 1]
        assert placements[1].hosts == tuple(seat.host for seat in seats)
        assert len(text) < 300 + nodes * 8 * (4 if order == "arbitrary" else 1)  # of 91 a rank, once
