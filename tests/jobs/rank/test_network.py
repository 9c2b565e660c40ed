"""The address and the interface of a rank, on hosts with networks of every kind."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import TopologyError
from jobs.rank.identity import RankInfo
from tests.jobs.rank.meeting import Meeting, info

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


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
    assert re.match(r"rank 0 on a listens on 10\.1\.0\.5:\d+, but cannot reach it itself; is the loopback", said)
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
