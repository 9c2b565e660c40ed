"""Agents that meet at the leader: all of them, or each says who is missing, or who else is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jobs.agent.meeting
from jobs.agent.link import Link
from jobs.agent.meeting import Gathering, Joining, Met
from jobs.errors import MeshrunError, RendezvousError, UnreachableError
from jobs.rank.identity import RankInfo
from jobs.run_dir import Attempt, RunDirectory, read_json, write_json
from jobs.spec import JobSpec, ResourceSpec

HOSTS = ("a", "b", "c")
ENDS_WITHIN_S = 60
"""For a whole meeting; only so that a hang fails."""

Open = Callable[..., Gathering | Joining]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return RunDirectory(tmp_path).attempt(0).make()


@pytest.fixture
def agent(attempt: Attempt) -> Iterator[Open]:
    """Called with an agent's number: its side of the meeting."""
    opened: list[Gathering | Joining] = []

    def open_one(number: int, timeout_s: float = 30, spares: int = 0, **more: Any) -> Gathering | Joining:
        known = {"expected_hosts": HOSTS, **{key: more.pop(key) for key in ("expected_hosts",) if key in more}}
        me = RankInfo("local", number, len(HOSTS), 0, 1, HOSTS[number], "7", noun="agent", **known)
        resources = ResourceSpec(nodes=len(HOSTS) - spares, spares=spares)
        spec = JobSpec(
            workload="mine", settings={}, resources=resources, executor="local", cluster="none",
            run_dir=attempt.path.parent, rendezvous_timeout_s=timeout_s, **more,
        )  # fmt: skip
        opened.append(Joining(me, spec, attempt) if number else Gathering(me, spec, attempt, ""))
        return opened[-1]

    yield open_one
    for one in opened:
        if one.keeper is not None:
            one.keeper.end()


def come(agents: Sequence[Gathering | Joining], until: Callable[[], bool] = lambda: False) -> list[Met | MeshrunError]:
    """What each comes to, in turns in this one process, since none of them ever waits by itself."""
    ends: dict[int, Met | MeshrunError] = {}
    deadline = time.monotonic() + ENDS_WITHIN_S
    while len(ends) < len(agents) and not until():
        assert time.monotonic() < deadline, "agents that have not come to an end"
        for index, one in enumerate(agents):
            if index not in ends:
                try:
                    met = one.look()
                except MeshrunError as error:
                    ends[index] = error
                else:
                    if met is not None:
                        ends[index] = met
        agents[-1].wait(0.01)
    return [ends[index] for index in sorted(ends)]


def at_its_deadline(one: Gathering | Joining) -> Met | MeshrunError:
    one._deadline = time.monotonic()
    (end,) = come([one])
    return end


def test_one_whose_imports_took_longer_than_the_deadline_is_not_late(agent: Open) -> None:
    slow = agent(1, timeout_s=0.2)
    leader, other = agent(0), agent(2)
    come([leader, other], until=lambda: len(leader._hosts) == 2)  # type: ignore[union-attr]
    time.sleep(0.3)
    assert all(isinstance(met, Met) for met in come([leader, other, slow]))


def test_a_spare_host_that_does_not_come_is_done_without(agent: Open) -> None:
    leader, other = agents = [agent(0, spares=1), agent(2, spares=1)]
    come(agents, until=lambda: len(leader._hosts) == 2)  # type: ignore[union-attr]
    for met in (at_its_deadline(leader), *come([other])):
        assert isinstance(met, Met)
        assert met.hosts == ("a", "", "c")


def test_they_learn_the_hosts_the_store_and_each_other(agent: Open) -> None:
    import torch.distributed as dist

    leader, *others = ends = come([agent(n) for n in (0, 2, 1)])
    assert all(isinstance(met, Met) for met in ends), ends
    assert isinstance(leader, Met)
    assert [met.hosts for met in ends if isinstance(met, Met)] == [HOSTS] * 3
    for number, met in zip((2, 1), others, strict=True):
        assert isinstance(met, Met)
        store = dist.TCPStore(met.address, met.port, is_master=False, wait_for_workers=False)
        store.add("came", 1)
        met.links[0].send({"from": number})
        assert list(met.links) == [0]
    assert store.add("came", 0) == 2
    heard: dict[int, Any] = {}
    deadline = time.monotonic() + ENDS_WITHIN_S
    while len(heard) < 2:
        assert time.monotonic() < deadline
        heard.update((number, messages) for number, link in leader.links.items() if (messages := link.receive()))
    assert heard == {1: [{"from": 1}], 2: [{"from": 2}]}


@pytest.mark.parametrize(("known", "where"), [(HOSTS, " on b"), ((), "")], ids=["known hosts", "unknown hosts"])
def test_a_missing_agent_is_named_as_one_and_its_host_only_where_the_scheduler_tells(
    known: tuple[str, ...], where: str, agent: Open
) -> None:
    ends = come([agent(0, timeout_s=2, expected_hosts=known), agent(2)])
    said = f"2 of 3 agents came within 2 s; missing: agent 1{where}; present: a: agent 0; c: agent 2"
    assert [str(error) for error in ends] == [said] * 2


@pytest.mark.parametrize("others", ["", "8-0", "7-3"])
def test_a_missing_leader_is_named(others: str, agent: Open, attempt: Attempt) -> None:
    if others:
        announce(attempt, 1, identity=others)
    (error,) = come([agent(1, timeout_s=0.5)])
    still = f", which is still that of {others}" if others else ""
    assert str(error) == (
        f"missing: agent 0 on a, which has not announced itself within 0.5 s (by {attempt.rendezvous}{still}); "
        "is it still starting, and does it see the same file system?"
    )


def test_a_range_without_a_free_port_is_said_to_all_at_once(agent: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError) as raised:
            agent(0, rendezvous_ports=(port, port))
        (error,) = come([agent(1)])
    assert str(error) == str(raised.value)
    assert f"agent 0 on a cannot listen: every port of rendezvous_ports {port}-{port} is taken" in str(error)


def test_a_second_agent_of_a_number_and_a_second_leader_end_the_meeting(agent: Open) -> None:
    ends = come([agent(0), agent(1), agent(1)])
    says = "two processes are agent 1, the first on b, the second on b; start every agent once, with submit.py or srun"
    assert {str(error) for error in ends} == {says}
    (error,) = come([first := agent(0)], until=lambda: first._deadline is not None) or [None]
    assert error is None
    agent(0).look()
    second = agent(0)
    come([second], until=lambda: second._deadline is not None)
    (error,) = come([first])
    assert str(error) == "two processes are agent 0, one on a; start every agent once, with submit.py or srun"


def announce(attempt: Attempt, port: int, identity: str = "7-0") -> None:
    """What the leader on host a said before its port went to somebody else."""
    said = {"address": "127.0.0.1", "port": port, "identity": identity, "nonce": "n0", "host": "a"}
    write_json(attempt.rendezvous, said)


SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
kept = []
while True:
    connection, _ = server.accept()
    kept.append(connection)
    if sys.argv[1] != "silent":
        connection.sendall(sys.argv[1].encode())
        connection.close()
"""
NO_LEADER = (RendezvousError, "but what answers there is not the leader of a job")
IMPOSTORS: dict[str, tuple[type[MeshrunError], str]] = {
    "": NO_LEADER,
    "SSH-2.0-OpenSSH_9.2\r\n": NO_LEADER,
    "silent": (RendezvousError, "but what listens there does not answer"),
    '{"leader": "8-0"}\n': (UnreachableError, "but the leader there belongs to 8-0, not to 7-0"),
    '{"leader": "7-0"}\n': (UnreachableError, "but the leader there belongs to another start of 7-0"),
}


@pytest.mark.parametrize("answer", IMPOSTORS)
def test_whoever_else_is_at_the_announced_port_is_not_joined_and_is_named_and_a_newer_leader_is_followed(
    answer: str, agent: Open, attempt: Attempt
) -> None:
    kind, why = IMPOSTORS[answer]
    with subprocess.Popen([sys.executable, "-c", SERVER, answer], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            announce(attempt, port)
            one, two = agent(1), agent(2)
            come([one], until=lambda: bool(one._fault or (answer == "silent" and one._link)))  # type: ignore[union-attr]
            error = at_its_deadline(one)
            assert type(error) is kind
            assert str(error).startswith(f"agent 0 announced 127.0.0.1:{port} on a, {why}"), error
            assert str(error).endswith("tried for 30 s")
            come([two], until=lambda: bool(two._fault or (answer == "silent" and two._link)))  # type: ignore[union-attr]
            ends = come([agent(0), agent(1), two])
            assert all(isinstance(met, Met) for met in ends), ends
        finally:
            server.kill()


def test_nobody_at_the_announced_port(agent: Open, attempt: Attempt) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    announce(attempt, port)
    come([one := agent(1)], until=lambda: bool(one._fault))  # type: ignore[union-attr]
    error = at_its_deadline(one)
    assert type(error) is UnreachableError
    assert "but it cannot be reached from here (Connection refused): agent 0 is gone, or a firewall" in str(error)


def test_a_leader_that_goes_away_or_says_no_more(
    agent: Open, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.agent.meeting, "GRACE_S", 0.5)
    server = socket.create_server(("127.0.0.1", 0))
    announce(attempt, server.getsockname()[1])
    for says_more, says in (
        (True, "agent 0 on a went away during rendezvous"),
        (False, "has come, but has not answer"),
    ):
        one = agent(1)
        come([one], until=lambda one=one: one._link is not None)  # type: ignore[attr-defined,misc]
        link = Link(server.accept()[0])
        link.send({"leader": "7-0", "left_s": 0.2})
        if says_more:
            come([one], until=lambda one=one: one._has_come)  # type: ignore[attr-defined,misc]
            link.close()
        (error,) = come([one])
        assert says in str(error)
        assert type(error) is RendezvousError


def test_what_listens_answers_nobody_without_the_files_nonce(agent: Open, attempt: Attempt) -> None:
    come([leader := agent(0)], until=lambda: leader._deadline is not None)
    said = read_json(attempt.rendezvous)
    assert said is not None
    messages: list[Any] = []
    for hello in ({"agent": 1, "host": "b", "nonce": "other"}, {"agent": 7, "host": "b", "nonce": said["nonce"]}):
        stranger = Link(socket.create_connection((said["address"], said["port"])))
        stranger.send(hello)
        deadline = time.monotonic() + ENDS_WITHIN_S
        while stranger.is_open:
            assert time.monotonic() < deadline
            leader.look()
            messages += stranger.receive()
    with socket.create_connection((said["address"], said["port"])) as scanner:
        scanner.sendall(os.urandom(64) + b"\n")
        error = at_its_deadline(leader)
    assert messages == [{"leader": "7-0"}] * 2
    assert "1 of 3 agents came within 30 s" in str(error)
