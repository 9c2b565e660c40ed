"""The ranks of one job find each other and nobody else's; who does not come is named, to everyone, in time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import RendezvousError, TopologyError
from jobs.rank.identity import RankInfo
from jobs.run_dir import write_json
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


def _rank(
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
        ports: Ports | None = None,
    ) -> list[Connection]:
        late = [*pauses, *[0.0] * len(infos)]
        return [self.start(_rank, me, announcement, timeout_s, value, late[i], ports) for i, me in enumerate(infos)]

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
    assert meeting.results([first]) == ["rank 0 is done, and after 2 s these are not: rank 2 on b"]
    assert meeting.results([second, fourth]) == ["finished", "finished"]


def test_where_the_scheduler_does_not_say_who_should_be_where_those_who_came_are_shown(
    meeting: Meeting, tmp_path: Path
) -> None:
    infos = [info(r, ["a", "b", "a", "b"], expected_hosts=()) for r in (0, 1, 2)]
    came = meeting.results(meeting.come(infos, tmp_path / "r.json", timeout_s=6))
    assert {c.error for c in came} == {
        "3 of 4 ranks came within 6 s; missing: rank 3; present: a: ranks 0 2; b: rank 1"
    }


def test_a_missing_agent_is_named_as_one(meeting: Meeting, tmp_path: Path) -> None:
    infos = [info(r, ["a", "b", "c"], noun="agent") for r in (0, 2)]
    came = meeting.results(meeting.come(infos, tmp_path / "r.json", timeout_s=4))
    assert {c.error for c in came} == {
        "2 of 3 agents came within 4 s; missing: agent 1 on b; present: a: agent 0; c: agent 2"
    }


def _joins_an_agents_store(end: Connection, me: RankInfo, announcement: Path) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    _rank(end, me, announcement, 30, 1.0, 0, None)


def test_agents_and_ranks_of_one_job_meet_in_one_store(meeting: Meeting, tmp_path: Path) -> None:
    """The agents' numbers, and what they have in the store, are not taken for the ranks'."""
    (port,) = meeting.results([meeting.start(_store, "")])
    infos = [
        info(r, ["a", "b"], noun=noun, master_addr="127.0.0.1", master_port=port)
        for noun in ("agent", "rank")
        for r in range(2)
    ]
    came = meeting.results([meeting.start(_joins_an_agents_store, me, tmp_path / "none.json") for me in infos])
    assert [c.error for c in came] == [""] * 4
    assert [c.total for c in came] == [2.0] * 4


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
    others = info(0, ["a", "a"], **stale).identity
    with socket.create_server(("127.0.0.1", 0)) as somebody_else:
        announce(announcement, somebody_else.getsockname()[1], others)
        (alone,) = meeting.results(meeting.come([info(1, ["a", "a"])], announcement, timeout_s=2))
        assert f"(in {announcement}, where the announcement is that of {others})" in alone.error
        ends = meeting.come([info(r, ["a", "a"]) for r in range(2)], announcement, pauses=[1.5, 0])
        assert [c.total for c in meeting.results(ends)] == [2.0, 2.0]
        somebody_else.setblocking(False)
        with pytest.raises(BlockingIOError):
            somebody_else.accept()
    assert json.loads(announcement.read_text())["identity"] == "7-0"


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
    _rank(end, me, announcement, 3, 1.0, 0, None)


def test_a_rank_0_that_was_stopped_keeps_nobody_waiting_for_ever(meeting: Meeting, tmp_path: Path) -> None:
    end = meeting.start(_is_patient_for_a_second, info(1, ["a", "b"]), tmp_path / "r.json")
    meeting.start(_stops_at_its_seat, info(0, ["a", "b"]), tmp_path / "r.json")
    (came,) = meeting.results([end])
    assert came.kind == "RendezvousError"
    assert came.error == "rank 0 on a has not answered 4 s after the start"
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


def test_who_waits_long_looks_seldom() -> None:
    from jobs.processes import look_again_in_s

    def looks(waits_s: float) -> int:
        waited, count = 0.0, 0
        while waited < waits_s:
            waited += look_again_in_s(waited)
            count += 1
        return count

    assert look_again_in_s(0) <= 0.01
    assert looks(10) < 80
    assert max(look_again_in_s(waited) for waited in range(10)) <= 0.25
    assert looks(600) < 500  # of 2,400 and more, once
    assert all(1 < look_again_in_s(3000) <= 2 for _ in range(100))
    assert len({look_again_in_s(3000) for _ in range(10)}) > 1


# --- ports ------------------------------------------------------------------------------------------------------------


def free_range(count: int) -> Ports:
    """Ports in a row that nobody has, below those that the kernel hands out by itself."""
    for _ in range(100):
        first = random.randrange(12_000, 32_000 - count)
        try:
            with ExitStack() as opened:
                for port in range(first, first + count):
                    opened.enter_context(socket.create_server(("", port)))
            return first, first + count - 1
        except OSError:
            continue
    raise AssertionError("no free ports")


@contextmanager
def taken(ports: Sequence[int]) -> Iterator[None]:
    """Somebody else's, in every way that a port can be taken."""

    def bound_only(port: int) -> socket.socket:
        keeper = socket.socket()
        keeper.bind(("127.0.0.1", port))
        return keeper

    ways: list[Callable[[int], socket.socket]] = [
        lambda port: socket.create_server(("127.0.0.1", port)),
        lambda port: socket.create_server(("", port)),
        lambda port: socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True),
        bound_only,
    ]
    with ExitStack() as opened:
        for index, port in enumerate(ports):
            opened.enter_context(ways[index % len(ways)](port))
        yield


@pytest.mark.parametrize("free", [0, 3, 5], ids=["the first", "one between", "the last"])
def test_the_one_free_port_of_a_range_is_found(meeting: Meeting, tmp_path: Path, free: int) -> None:
    first, last = free_range(6)
    with taken([port for port in range(first, last + 1) if port != first + free]):
        infos = [info(r, ["a", "b"]) for r in range(2)]
        came = meeting.results(meeting.come(infos, tmp_path / "r.json", ports=(first, last)))
    assert [c.total for c in came] == [2.0, 2.0]
    assert port_of(tmp_path / "r.json") == first + free


def test_a_range_without_a_free_port_is_said_to_all_at_once(meeting: Meeting, tmp_path: Path) -> None:
    first, last = free_range(5)
    with taken(range(first, last + 1)):
        infos = [info(r, ["a", "b"]) for r in range(2)]
        came = meeting.results(
            meeting.come(infos, tmp_path / "r.json", timeout_s=50, ports=(first, last), pauses=[0.5, 0])
        )
    assert {c.kind for c in came} == {"RendezvousError"}
    assert {c.error for c in came} == {
        f"rank 0 on a finds every port of rendezvous_ports {first}-{last} taken on 127.0.0.1; "
        "widen the range in the cluster config, or leave it out where no firewall asks for one"
    }
    assert all(c.seconds < 10 for c in came)


def test_connections_of_an_earlier_store_do_not_keep_its_port() -> None:
    from jobs.rank.rendezvous import listen

    ports = free_range(1)
    server = listen(info(0, ["a"]), "127.0.0.1", ports)
    client = socket.create_connection(("127.0.0.1", ports[0]))
    accepted, _ = server.accept()
    accepted.close()  # the side that closes first waits; that of the server keeps the port from a plain bind()
    client.recv(1)
    client.close()
    server.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", ports[0]))
    listen(info(0, ["a"], attempt=1), "127.0.0.1", ports).close()


def test_a_port_has_one_listener_however_many_try_at_once() -> None:
    """Bound at the same time by all, with SO_REUSEADDR; only listen() decides."""
    from jobs.errors import RendezvousError
    from jobs.rank.rendezvous import listen

    first, last = free_range(4)
    won: list[socket.socket] = []
    lost: list[str] = []
    ready = threading.Barrier(12)

    def take() -> None:
        ready.wait()
        try:
            won.append(listen(info(0, ["a"]), "127.0.0.1", (first, last)))
        except RendezvousError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sock.getsockname()[1] for sock in won) == list(range(first, last + 1))
    assert len(lost) == 8
    for sock in won:
        sock.close()


def test_jobs_do_not_all_begin_at_the_same_port() -> None:
    from jobs.rank.rendezvous import listen

    ports = free_range(100)
    began = set()
    for job in range(20):
        with listen(info(0, ["a"], job_id=str(5000 + job)), "127.0.0.1", ports) as listener:
            began.add(listener.getsockname()[1])
    assert len(began) > 10


def test_what_forbids_to_listen_is_said() -> None:
    from jobs.rank.rendezvous import listen

    expected = (
        r"rank 0 on a cannot listen on 203\.0\.113\.1:29500: .*; rendezvous_ports of the cluster config is 29500-"
    )
    with pytest.raises(RendezvousError, match=expected):
        listen(info(0, ["a"]), "203.0.113.1", (29500, 29501))


def test_eight_jobs_at_once_in_a_range_of_eight_ports(meeting: Meeting, tmp_path: Path) -> None:
    ports = free_range(8)
    jobs = {str(100 + n): 10.0**n for n in range(8)}
    ends = []
    for order in (0, 1):
        for job, value in jobs.items():
            announcement = tmp_path / job / "r.json"
            announcement.parent.mkdir(exist_ok=True)
            # The second ranks come when all eight stores are open.
            if order == 1:
                for other in jobs:
                    port_of(tmp_path / other / "r.json")
            me = info(order, ["a", "b"], job_id=job)
            ends += meeting.come([me], announcement, value=value, ports=ports)
    came = meeting.results(ends)
    assert [c.error for c in came] == [""] * 16
    assert [c.total for c in came] == [2 * value for value in jobs.values()] * 2
    assert {port_of(tmp_path / job / "r.json") for job in jobs} == set(range(ports[0], ports[1] + 1))


# --- who is at the announced port -------------------------------------------------------------------------------------


def _store(end: Connection, owner: str) -> None:
    """A store of torch's, of whomever."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if owner:
        store.set("meshrun/owner", owner)
    end.send(store.port)
    time.sleep(600)


def _stopped_store(end: Connection) -> None:
    """Torch's own, of a process that was stopped or hangs in the kernel."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("meshrun/owner", "7-0 n0")
    end.send(store.port)
    os.kill(os.getpid(), signal.SIGSTOP)


def _server(end: Connection, answers: bytes | None) -> None:
    """Not a store: says something to everybody and closes, or (None) never says anything."""
    server = socket.create_server(("127.0.0.1", 0))
    end.send(server.getsockname()[1])
    kept = []
    while True:
        connection, _ = server.accept()
        if answers is None:
            kept.append(connection)
            continue
        connection.sendall(answers)
        connection.close()


IMPOSTORS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "another job's store": (_store, ("8-0 n1",), "and the store there is that of 8-0, not that of 7-0"),
    "its predecessor's": (_store, ("7-3 n1",), "and the store there is that of 7-3, not that of 7-0"),
    "another start's": (_store, ("7-0 n1",), "and the store there is that of another start of 7-0"),
    "another program's store": (_store, ("",), "and the store there is not one of meshrun's"),
    "a store that was stopped": (_stopped_store, (), "where something listens that does not answer"),
    "a server that never answers": (_server, (None,), "where something listens that does not answer"),
    "a server that closes": (_server, (b"",), "where something listens that is no store"),
    "a server of something else": (_server, (b"SSH-2.0-OpenSSH_9.2\r\n",), "where something listens that is no store"),
}


def impostors(meeting: Meeting) -> dict[str, int]:
    """The ports of one of each."""
    ends = {name: meeting.start(target, *args) for name, (target, args, _) in IMPOSTORS.items()}
    return dict(zip(ends, meeting.results(list(ends.values())), strict=True))


def test_whoever_else_is_at_the_announced_port_is_not_joined_and_is_named(meeting: Meeting, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    expected = {name: why for name, (_, _, why) in IMPOSTORS.items()}
    expected["nobody"] = "and it cannot be reached from here (Connection refused)"
    ports = {**impostors(meeting), "nobody": nobody}
    ends = []
    for name, port in ports.items():
        announce(tmp_path / f"{name}.json", port)
        ends += meeting.come([info(1, ["a", "b"])], tmp_path / f"{name}.json", timeout_s=10)
    for (name, port), came in zip(ports.items(), meeting.results(ends), strict=True):
        # Whatever listens may be rank 0 that hangs, and then it is to blame.
        listens = "where something listens" in expected[name]
        assert came.kind == ("RendezvousError" if listens else "UnreachableError"), name
        assert came.error.startswith(f"rank 0 announced 127.0.0.1:{port} on a, {expected[name]}"), name
        assert came.error.endswith("asked for 10 s"), name
        assert "\n" not in came.error
        assert came.seconds < 25, name


def test_a_newer_announcement_is_followed_whoever_was_at_the_older_ones_port(meeting: Meeting, tmp_path: Path) -> None:
    ports = impostors(meeting)
    ends = []
    for name, port in ports.items():
        announce(tmp_path / f"{name}.json", port)
        infos = [info(r, ["a", "b"]) for r in range(2)]
        ends += meeting.come(infos, tmp_path / f"{name}.json", pauses=[4, 0])
    came = meeting.results(ends)
    assert [c.error for c in came] == [""] * len(ends)
    assert [c.total for c in came] == [2.0] * len(ends)


def _busy_store(end: Connection, busy_s: float) -> None:
    """The job's own, behind a door at which connections are lost for a while, as where hundreds come at once."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("meshrun/owner", "7-0 n0")
    door = socket.create_server(("127.0.0.1", 0))
    end.send(door.getsockname()[1])

    def pass_on(source: socket.socket, to: socket.socket) -> None:
        while data := source.recv(4096):
            to.sendall(data)
        to.close()

    opens = time.monotonic() + busy_s

    def admit(guest: socket.socket) -> None:
        if time.monotonic() < opens:
            guest.close()
            return
        inside = socket.create_connection(("127.0.0.1", store.port))
        threading.Thread(target=pass_on, args=(guest, inside), daemon=True).start()
        pass_on(inside, guest)

    while True:
        threading.Thread(target=admit, args=(door.accept()[0],), daemon=True).start()


def _connects(end: Connection, port: int) -> None:
    from jobs.rank.rendezvous import _connect

    said = {"address": "127.0.0.1", "port": port, "identity": "7-0", "nonce": "n0", "host": "a"}
    try:
        end.send(_connect(said, 60).get("meshrun/owner").decode())
    except Exception as error:
        end.send(repr(error))
    os._exit(0)


def test_a_store_that_is_busy_for_a_while_is_still_a_store(meeting: Meeting) -> None:
    (port,) = meeting.results([meeting.start(_busy_store, 6.0)])
    assert meeting.results([meeting.start(_connects, port)]) == ["7-0 n0"]


# --- a requeue, and what is left of the attempt before ----------------------------------------------------------------


def _lingers(end: Connection, me: RankInfo, announcement: Path, ports: Ports, how: str) -> None:
    """Rank 0 of the earlier attempt, which the scheduler has not ended, or not wholly."""
    from jobs.rank import rendezvous

    def linger(me: RankInfo, store: Any, *_: object) -> None:
        child = os.fork() if how == "its child holds the port" else 1
        if child == 0:
            time.sleep(600)
        end.send(child)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how != "alive":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    rendezvous._seat_everyone = linger  # type: ignore[assignment]
    rendezvous.join(me, "cpu", announcement, 60, None, ports)


@pytest.mark.parametrize("how", ["alive", "stopped", "its child holds the port"])
def test_a_requeued_job_meets_beside_its_lingering_predecessor(meeting: Meeting, tmp_path: Path, how: str) -> None:
    """The same run directory, range and job, and so also the same place to begin in the range."""
    ports = free_range(2)
    for attempt in ("attempt-0", "attempt-1"):
        (tmp_path / attempt).mkdir()
    old = meeting.start(_lingers, info(0, ["a", "b"]), tmp_path / "attempt-0" / "r.json", ports, how)
    (child,) = meeting.results([old])
    try:
        infos = [info(r, ["a", "b"], attempt=1) for r in range(2)]
        ends = meeting.come(infos, tmp_path / "attempt-1" / "r.json", ports=ports, value=5)
        # A rank of the earlier attempt that is still on its way finds the predecessor's own place, or nobody.
        late = meeting.come([info(1, ["a", "b"])], tmp_path / "attempt-0" / "r.json", timeout_s=4)
        came = meeting.results(ends)
        assert [c.error for c in came] == ["", ""]
        assert [c.total for c in came] == [10.0, 10.0]
        was, now = (port_of(tmp_path / attempt / "r.json") for attempt in ("attempt-0", "attempt-1"))
        assert {was, now} == set(ports)
        assert how == "alive" or meeting.results(late)[0].kind == "RendezvousError"
    finally:
        if child > 1:
            os.kill(child, signal.SIGKILL)


def test_a_straggler_of_the_earlier_attempt_is_not_let_into_the_newer_ones_store(
    meeting: Meeting, tmp_path: Path
) -> None:
    """Rank 0 died, and the requeued one got its very port."""
    ports = free_range(1)
    for attempt in ("attempt-0", "attempt-1"):
        (tmp_path / attempt).mkdir()
    announce(tmp_path / "attempt-0" / "r.json", ports[0])
    infos = [info(r, ["a", "b"], attempt=1) for r in range(2)]
    ends = meeting.come(infos, tmp_path / "attempt-1" / "r.json", ports=ports, pauses=[0, 9])
    assert port_of(tmp_path / "attempt-1" / "r.json") == ports[0]
    (straggler,) = meeting.results(meeting.come([info(1, ["a", "b"])], tmp_path / "attempt-0" / "r.json", timeout_s=5))
    assert straggler.kind == "UnreachableError"
    assert "and the store there is that of 7-1, not that of 7-0" in straggler.error
    assert [c.total for c in meeting.results(ends)] == [2.0, 2.0]


# --- addresses --------------------------------------------------------------------------------------------------------


def slurm_info(**more: Any) -> RankInfo:
    """Rank 0 of two, each on a host of its own."""
    return dataclasses.replace(info(0, ["a", "b"]), launcher="slurm", **more)


def test_addresses_of_this_machine() -> None:
    from jobs.rank.network import own_address

    assert own_address(info(0, ["a"]), None, None) == "127.0.0.1"
    assert own_address(info(0, ["a"]), "lo", None) == "127.0.0.1"
    with pytest.raises(TopologyError, match=r"interface 'nothere0' .*does not exist on a \(it has: .*lo 127\.0\.0\.1"):
        own_address(info(0, ["a"]), "nothere0", None)
    with pytest.raises(TopologyError, match=r"'lo' .*has the address 127\.0\.0\.1, by which no other host can reach"):
        own_address(slurm_info(), "lo", None)


ASK = """
import json, sys
from jobs import errors
from jobs.rank import network
from jobs.rank import rendezvous
from jobs.rank.identity import RankInfo
for launcher, world, interface, peer in json.loads(sys.argv[1]):
    info = RankInfo(launcher, 0, world, 0, 1, "a", "7", network_peer=peer)
    try:
        address = network.own_address(info, interface, peer)
        print(json.dumps([address, network.socket_variables(info, address, interface, {})]))
    except errors.TopologyError as error:
        print(json.dumps([str(error), {}]))
"""


def on_a_host(network: str, code: str, *words: str) -> list[Any]:
    """The lines of JSON that Python code prints on a host with this network."""
    from tests.slurm.harness import PATH, _unshare

    script = f'set -e; export PATH={PATH}; ip link set lo up; {network}\nexec "$@"'
    done = subprocess.run(
        [*_unshare(), "--mount-proc", "bash", "-c", script, "bash", sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask(network: str, *questions: tuple[str, int, str | None, str | None]) -> list[tuple[str, dict[str, str]]]:
    """What own_address answers to (launcher, ranks, interface, peer) on a host with this network, and the variables."""
    return [tuple(answer) for answer in on_a_host(network, ASK, json.dumps(questions))]


def cable(name: str, *addresses: str, up: bool = True, far_end_up: bool = True) -> str:
    """Shell lines that make an interface."""
    lines = [f"ip link add {name} type veth peer name far-{name}"]
    lines += [f"ip address add {address} dev {name}" + (" nodad" if ":" in address else "") for address in addresses]
    lines += [f"ip link set {name} up"] if up else []
    lines += [f"ip link set far-{name} up"] if far_end_up else []
    return "; ".join(lines) + "; "


@pytest.fixture
def needs_namespaces() -> None:
    from tests.slurm.harness import why_not_here

    reason = why_not_here()
    if reason:
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_namespaces")
def test_the_address_is_the_one_that_leads_to_the_others() -> None:
    network = (
        cable("docker0", "172.17.0.1/16") + cable("eth0", "10.1.0.5/24", "10.2.0.5/24") + cable("ib0", "10.3.0.5/24")
    )
    eth0, ib0, docker0 = ({"GLOO_SOCKET_IFNAME": name} for name in ("eth0", "ib0", "docker0"))
    assert ask(
        network,
        ("slurm", 2, None, "10.3.0.1"),
        ("slurm", 2, None, "10.3.0.5"),  # this very host's own, as on the first host of a job
        ("slurm", 2, None, "10.2.0.1"),  # by the second address of an interface
        ("slurm", 2, None, "10.9.0.1"),  # no way there
        ("slurm", 2, None, None),
        ("slurm", 2, None, "127.0.1.1"),
        ("slurm", 2, None, "172.17.0.9"),
        ("torchrun", 2, None, "localhost"),
        ("torchrun", 1, None, "localhost"),
        ("local", 2, None, None),
        ("slurm", 2, "ib0", "10.1.0.1"),
    ) == [
        ("10.3.0.5", ib0),
        ("10.3.0.5", ib0),
        ("10.2.0.5", eth0),
        ("10.1.0.5", eth0),
        ("10.1.0.5", eth0),
        ("10.1.0.5", eth0),
        ("172.17.0.1", docker0),
        ("10.1.0.5", eth0),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"}),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"}),
        ("10.3.0.5", {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}),
    ]


@pytest.mark.usefixtures("needs_namespaces")
def test_an_interface_that_cannot_be_used_is_said_to_be_so() -> None:
    network = (
        cable("off0", "10.1.0.5/24", up=False)
        + cable("cut0", "10.2.0.5/24", far_end_up=False)
        + cable("six0", "fd00::5/64")
        + cable("none0")
    )
    answers = [
        answer
        for answer, _ in ask(
            network,
            ("slurm", 2, "off0", None),
            ("slurm", 2, "cut0", None),
            ("slurm", 2, "six0", None),
            ("slurm", 2, "none0", None),
            ("slurm", 2, "eth0", None),
            ("slurm", 2, None, "10.2.0.1"),
            ("slurm", 1, None, None),
        )
    ]
    has = answers[0].partition(" (it has: ")[2]
    assert "off0 down 10.1.0.5" in has
    assert "cut0 without a link 10.2.0.5" in has
    assert "lo 127.0.0.1" in has
    ipv6 = ", only IPv6, and ranks meet over IPv4"
    assert [answer.partition(" (it has: ")[0] for answer in answers] == [
        "interface 'off0' of the cluster config is down on a",
        "interface 'cut0' of the cluster config has no link on a",
        f"interface 'six0' of the cluster config has no IPv4 address{ipv6} on a",
        "interface 'none0' of the cluster config has no IPv4 address on a",
        "interface 'eth0' of the cluster config does not exist on a",
        "no network interface of a is up and has an IPv4 address that the other hosts could reach",
        "127.0.0.1",
    ]
    assert answers[5].endswith(f"){ipv6}")


JOIN = """
import json, sys
from pathlib import Path
from jobs import errors
from jobs.rank import network
from jobs.rank import rendezvous
from jobs.rank.identity import RankInfo
try:
    rendezvous.join(RankInfo("slurm", 0, 2, 0, 1, "a", "7"), "cpu", Path(sys.argv[1]), 3, None)
except errors.RendezvousError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.usefixtures("needs_namespaces")
def test_a_host_that_does_not_reach_itself_says_so_to_all(meeting: Meeting, tmp_path: Path) -> None:
    ends = meeting.come([info(1, ["a", "b"])], tmp_path / "r.json")
    (said,) = on_a_host(cable("eth0", "10.1.0.5/24") + "ip link set lo down", JOIN, str(tmp_path / "r.json"))
    assert re.match(r"rank 0 listens on 10\.1\.0\.5:\d+ and cannot reach it from a itself; is its loopback", said)
    (came,) = meeting.results(ends)
    assert came.error == said


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("GLOO_SOCKET_IFNAME=eth0", None),
        ("GLOO_SOCKET_IFNAME=eth0,six0", None),
        ("GLOO_SOCKET_IFNAME=six0", None),
        ("GLOO_SOCKET_IFNAME=^lo", "interface '^lo' does not exist"),
        ("GLOO_SOCKET_IFNAME=eth", "interface 'eth' does not exist"),
        ("GLOO_SOCKET_IFNAME=eth0,eth7", "interface 'eth7' does not exist"),
        ("GLOO_SOCKET_IFNAME=off0", "interface 'off0' is down"),
        ("GLOO_SOCKET_IFNAME=lo", "interface 'lo' has the address 127.0.0.1, by which no other host can reach it"),
        *((f"NCCL_SOCKET_IFNAME={value}", None) for value in ("eth", "=eth0", "^lo,docker", "^=eth0", "no0,six")),
        *(
            (f"NCCL_SOCKET_IFNAME={value}", "it leaves no interface that leads to other hosts")
            for value in ("lo", "=eth", "^eth,six", "off0")
        ),
    ],
)
def test_a_socket_variable_that_cannot_work_is_named(
    variable: str, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.rank import network

    usable = {"is_up": True, "is_running": True, "has_ipv6": False}
    here = [
        network.Interface("lo", ("127.0.0.1",), **usable),
        network.Interface("eth0", ("10.1.0.5",), **usable),
        network.Interface("off0", ("10.3.0.5",), **{**usable, "is_up": False}),
        network.Interface("six0", (), **{**usable, "has_ipv6": True}),
    ]
    monkeypatch.setattr(network, "interfaces", lambda: here)
    env = dict([variable.split("=", 1)])
    network.check_socket_variables(slurm_info(), "cpu", {"NCCL_SOCKET_IFNAME": "none0"})
    if says is None:
        network.check_socket_variables(slurm_info(), "cuda", env)
        return
    with pytest.raises(TopologyError) as caught:
        network.check_socket_variables(slurm_info(), "cuda", env)
    assert str(caught.value) == (
        f"{variable} in the environment: {says} on a (it has: lo 127.0.0.1, eth0 10.1.0.5, off0 down 10.3.0.5, six0); "
        f"unset it, or give another: --env {variable.partition('=')[0]}=..."
    )


def test_what_the_environment_says_of_sockets_wins_and_is_said_to(caplog: pytest.LogCaptureFixture) -> None:
    from jobs.rank.network import socket_variables

    caplog.set_level("INFO")
    me = info(0, ["a"])
    assert socket_variables(me, "127.0.0.1", None, {"NCCL_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert not caplog.messages
    assert socket_variables(me, "10.0.0.1", "ib0", {"NCCL_SOCKET_IFNAME": "eth3", "GLOO_SOCKET_IFNAME": ""}) == {
        "GLOO_SOCKET_IFNAME": "ib0"
    }
    assert caplog.messages == ["NCCL_SOCKET_IFNAME=eth3 of the environment wins over interface ib0"]


# --- the mesh's own groups --------------------------------------------------------------------------------------------


def _reduce_along(
    end: Connection, me: RankInfo, announcement: Path, spec: MeshSpec, dimension: str, silent: bool, timeout_s: float
) -> None:
    import torch
    import torch.distributed as dist

    from jobs.rank import rendezvous
    from jobs.rank.mesh import build_mesh

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
    if not error:  # rank 0 holds the store, which others may still need
        meeting.finish(30)
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
