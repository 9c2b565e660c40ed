"""The ranks of one job share one store, and nobody else's, whatever else is at the port or left from before."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import RendezvousError
from jobs.rank.identity import RankInfo
from tests.jobs.rank.meeting import Meeting, Ports, announce, info, port_of, store_process

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_a_missing_rank_0_is_named(meeting: Meeting, tmp_path: Path) -> None:
    ends = meeting.come([info(r, ["a", "b"]) for r in (1,)], tmp_path / "r.json", timeout_s=2)
    (came,) = meeting.results(ends)
    assert came.kind == "RendezvousError"
    assert "missing: rank 0 on a, which has not announced itself within 2 s" in came.error
    assert str(tmp_path / "r.json") in came.error
    assert came.seconds < 20


@pytest.mark.parametrize("stale", [{"job_id": "6"}, {"attempt": 1}], ids=["another job's", "another attempt's"])
def test_a_stale_announcement_is_ignored(meeting: Meeting, tmp_path: Path, stale: dict[str, Any]) -> None:
    announcement = tmp_path / "r.json"
    others = info(0, ["a", "a"], **stale).identity
    with socket.create_server(("127.0.0.1", 0)) as somebody_else:
        announce(announcement, somebody_else.getsockname()[1], others)
        (alone,) = meeting.results(meeting.come([info(1, ["a", "a"])], announcement, timeout_s=2))
        assert f"(by {announcement}, which is still that of {others})" in alone.error
        ends = meeting.come([info(r, ["a", "a"]) for r in range(2)], announcement, pauses=[1.5, 0])
        assert [c.total for c in meeting.results(ends)] == [2.0, 2.0]
        somebody_else.setblocking(False)
        with pytest.raises(BlockingIOError):
            somebody_else.accept()
    assert json.loads(announcement.read_text())["identity"] == "7-0"


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
def test_the_one_free_port_of_a_range_is_found(free: int) -> None:
    from jobs.rank.network import listen

    first, last = free_range(6)
    with (
        taken([port for port in range(first, last + 1) if port != first + free]),
        listen(info(0, ["a", "b"]), "127.0.0.1", (first, last)) as listener,
    ):
        assert listener.getsockname()[1] == first + free


def test_a_range_without_a_free_port_is_said_to_all_at_once(meeting: Meeting, tmp_path: Path) -> None:
    first, last = free_range(5)
    with taken(range(first, last + 1)):
        infos = [info(r, ["a", "b"]) for r in range(2)]
        came = meeting.results(
            meeting.come(infos, tmp_path / "r.json", timeout_s=50, ports=(first, last), pauses=[0.5, 0])
        )
    assert {c.kind for c in came} == {"RendezvousError"}
    assert {c.error for c in came} == {
        f"rank 0 on a cannot listen: every port of rendezvous_ports {first}-{last} is taken on 127.0.0.1; "
        "widen the range in the cluster config, or leave it out where no firewall needs one"
    }
    assert all(c.seconds < 10 for c in came)


def test_connections_of_an_earlier_store_do_not_keep_its_port() -> None:
    from jobs.rank.network import listen

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
    from jobs.rank.network import listen

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
    from jobs.rank.network import listen

    ports = free_range(100)
    began = set()
    for job in range(20):
        with listen(info(0, ["a"], job_id=str(5000 + job)), "127.0.0.1", ports) as listener:
            began.add(listener.getsockname()[1])
    assert len(began) > 10


def test_what_forbids_to_listen_is_said() -> None:
    from jobs.rank.network import listen

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
    "another job's store": (store_process, ("8-0 n1",), "but the store there belongs to 8-0, not to 7-0"),
    "its predecessor's": (store_process, ("7-3 n1",), "but the store there belongs to 7-3, not to 7-0"),
    "another start's": (store_process, ("7-0 n1",), "but the store there belongs to another start of 7-0"),
    "another program's store": (store_process, ("",), "but the TCPStore there is not meshrun's, and this is 7-0"),
    "a store that was stopped": (_stopped_store, (), "but what listens there does not answer"),
    "a server that never answers": (_server, (None,), "but what listens there does not answer"),
    "a server that closes": (_server, (b"",), "but what answers there is not a TCPStore"),
    "a server of something else": (_server, (b"SSH-2.0-OpenSSH_9.2\r\n",), "but what answers there is not a TCPStore"),
}


def impostors(meeting: Meeting) -> dict[str, int]:
    """The ports of one of each."""
    ends = {name: meeting.start(target, *args) for name, (target, args, _) in IMPOSTORS.items()}
    return dict(zip(ends, meeting.results(list(ends.values())), strict=True))


def test_whoever_else_is_at_the_announced_port_is_not_joined_and_is_named(meeting: Meeting, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    expected = {name: why for name, (_, _, why) in IMPOSTORS.items()}
    expected["nobody"] = "but it cannot be reached from here (Connection refused)"
    ports = {**impostors(meeting), "nobody": nobody}
    ends = []
    for name, port in ports.items():
        announce(tmp_path / f"{name}.json", port)
        ends += meeting.come([info(1, ["a", "b"])], tmp_path / f"{name}.json", timeout_s=10)
    for (name, port), came in zip(ports.items(), meeting.results(ends), strict=True):
        # Whatever listens may be rank 0 that hangs, and then it is to blame.
        listens = expected[name].startswith("but what ")
        assert came.kind == ("RendezvousError" if listens else "UnreachableError"), name
        assert came.error.startswith(f"rank 0 announced 127.0.0.1:{port} on a, {expected[name]}"), name
        assert came.error.endswith("tried for 10 s"), name
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
    from jobs.rank.store import connect

    said = {"address": "127.0.0.1", "port": port, "identity": "7-0", "nonce": "n0", "host": "a"}
    try:
        end.send(connect(said, 60).get("meshrun/owner").decode())
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
            os.kill(os.getpid(), signal.SIGSTOP)  # returns before this thread stops: the signal is the main thread's
        elif how != "alive":
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
