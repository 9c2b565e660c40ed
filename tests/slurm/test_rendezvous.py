"""Jobs on the same hosts at once, networks not what they seem, requeues: ranks meet their own, or say why not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.submitting import Line, submit, wait_until
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(400)]

SHAPE = ("--nodes", "2", "--gpus-per-node", "1")
DEADLINE_S = 240
"""For jobs on a busy box; only so that a hang fails."""

WORKLOAD = '''
import os
import socket
import struct
import time
from pathlib import Path

from workloads.base import WorkloadConfig, WorkloadEntry

if os.environ.get("SLURM_PROCID") == os.environ.get("ABSENT", "none"):
    time.sleep(600)


class Config(WorkloadConfig):
    value: float = 1.0
    party: str = ""
    """A folder in which every job leaves a file, and goes on when there are `guests`."""
    guests: int = 0
    leaves_behind: str = ""
    """What the first attempt's rank 0 leaves behind: "port" = a process that Slurm does not find, with its sockets."""


def peers():
    """The addresses that this process is connected to."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "01" and f"socket:[{words[9]}]" in mine:
                # In tcp6 the last word of the mapped address is the IPv4 one.
                found.add(socket.inet_ntoa(struct.pack("<I", int(words[2].partition(":")[0][-8:], 16))))
    return sorted(found)


def leave_behind():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(120)
        os._exit(0)
    os.wait()


def run(config, ctx):
    import torch
    import torch.distributed as dist

    total = torch.full((1,), config.value)
    dist.all_reduce(total)
    if config.leaves_behind and ctx.attempt == 0:
        if ctx.rank == 0:
            leave_behind()
            Path("left").touch()
        time.sleep(600)
    if config.party:
        guest = Path(config.party) / f"{config.value:g}-{ctx.rank}"
        guest.touch()
        while len(list(guest.parent.iterdir())) < config.guests:
            time.sleep(0.2)
    dist.all_reduce(total)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    met = {"port": int(os.environ["MASTER_PORT"]), "peers": peers(), "attempt": ctx.attempt}
    return {"total": total.item(), **met, **{n: os.environ.get(n) for n in names}}


ENTRY = WorkloadEntry(name="mine", config=Config, run=run, summary="Ranks that meet.")
'''


def start(cluster: Cluster, directory: Path, site: str, *words: str, deadline_s: float = 120) -> Line:
    """A job of two hosts, one rank on each, followed to its end."""
    directory.mkdir(exist_ok=True)
    (directory / "mine.py").write_text(WORKLOAD)
    (directory / "site.yaml").write_text(f"executor: slurm\nrendezvous_timeout_s: {deadline_s}\n{site}\n")
    return submit(directory, "mine:ENTRY", "--wait", "--cluster", "site.yaml", *SHAPE, *words, env=cluster.env)


def announced(line: Line, attempt: int = 0) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((line.run_dir / f"attempt-{attempt}" / "rendezvous.json").read_text())
    return said


def result_of(line: Line) -> dict[str, Any]:
    code, out, err = line.finish(DEADLINE_S)
    assert code == 0, out + err
    result: dict[str, Any] = line.result()["result"]
    return result


@contextmanager
def taken(cluster: Cluster, host: str, *ports: int) -> Iterator[None]:
    """Somebody else's servers on a host."""
    script = (
        "import socket, sys, time\n"
        "kept = [socket.create_server(('', int(port))) for port in sys.argv[1:]]\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    words = cluster.exec(host, sys.executable, "-c", script, *ports)
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield
    finally:
        server.kill()
        server.communicate()


def test_eight_jobs_at_once_on_the_same_two_hosts(make_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """All of them hold a port at the same time, and a second one while hosts meet: there are only just enough."""
    cluster = make_cluster(gpus=8)
    party = tmp_path / "party"
    party.mkdir()
    lines: list[Line] = []
    try:
        with taken(cluster, "node0", 29503, 29507):
            for n in range(8):
                words = [f"value={10**n}", f"party={party}", "guests=16"]
                lines.append(start(cluster, tmp_path / f"job{n}", "rendezvous_ports: 29500-29517", *words))
            results = [result_of(line) for line in lines]
    finally:
        for line in lines:
            line.kill_everything()
    assert [result["total"] for result in results] == [4.0 * 10**n for n in range(8)]
    free = set(range(29500, 29518)) - {29503, 29507}
    ports = {result["port"] for result in results}  # of the stores
    assert len(ports) == 8
    assert ports | {announced(line)["port"] for line in lines} <= free
    assert {announced(line)["address"] for line in lines} == {"10.77.0.10"}


def test_a_full_range_ends_the_job_in_seconds(slurm: Cluster, tmp_path: Path) -> None:
    with taken(slurm, "node0", 29500, 29501):
        line = start(slurm, tmp_path, "rendezvous_ports: 29500-29501")
        code, out, err = line.finish(DEADLINE_S)
    assert code == 1, out + err
    reason = "every port of rendezvous_ports 29500-29501 is taken on 10.77.0.10"
    assert f"agent 0 on node0 cannot listen: {reason}" in err, err


def test_the_network_is_slurms_own_whatever_the_hosts_call_themselves(slurm: Cluster, tmp_path: Path) -> None:
    """To itself each of these hosts is 127.0.1.1."""
    for host in ("node0", "node1"):
        assert slurm.run(*slurm.exec(host, "getent", "ahostsv4", host)).split()[0] == "127.0.1.1"
    line = start(slurm, tmp_path, "")
    result = result_of(line)
    assert result["total"] == 4.0
    assert announced(line)["address"] == "10.77.0.10"
    assert "10.77.0.11" in result["peers"]
    assert set(result["peers"]) <= {"10.77.0.10", "10.77.0.11"}
    assert (result["GLOO_SOCKET_IFNAME"], result["NCCL_SOCKET_IFNAME"]) == ("eth0", None)


def test_a_configured_interface_is_the_one_that_is_used(slurm: Cluster, tmp_path: Path) -> None:
    line = start(slurm, tmp_path, "interface: eth1")
    result = result_of(line)
    assert result["total"] == 4.0
    assert announced(line)["address"] == "10.78.0.10"
    assert "10.78.0.11" in result["peers"]
    assert set(result["peers"]) <= {"10.78.0.10", "10.78.0.11"}
    assert (result["GLOO_SOCKET_IFNAME"], result["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")


def test_the_jobs_own_variables_win_over_the_interface(slurm: Cluster, tmp_path: Path) -> None:
    line = start(slurm, tmp_path, "interface: eth0\nenv: {NCCL_SOCKET_IFNAME: ib0}", "--env", "GLOO_SOCKET_IFNAME=eth1")
    result = result_of(line)
    assert announced(line)["address"] == "10.77.0.10"
    assert {"10.77.0.10", "10.78.0.11"} <= set(result["peers"])  # the store's, and gloo's
    assert result["NCCL_SOCKET_IFNAME"] == "ib0"
    said = (line.run_dir / "attempt-0" / "rank-0.log").read_text()
    assert "GLOO_SOCKET_IFNAME=eth1 of the environment wins over interface eth0" in said
    assert "NCCL_SOCKET_IFNAME=ib0 of the environment wins over interface eth0" in said


@pytest.mark.parametrize("host", ["node0", "node1"], ids=["of rank 0", "of another"])
def test_an_interface_that_is_down_ends_the_job_in_seconds(host: str, slurm: Cluster, tmp_path: Path) -> None:
    slurm.set_interface(host, "eth1", up=False)
    line = start(slurm, tmp_path, "interface: eth1")
    wait_until(lambda: (line.run_dir / "attempt-0").exists(), "the job runs", DEADLINE_S)
    began = time.monotonic()
    code, out, err = line.finish(DEADLINE_S)
    assert code == 1, out + err
    assert f"interface 'eth1' of the cluster config is down on {host} (it has: lo 127.0.0.1, eth0 10.77.0.1" in err, err
    assert time.monotonic() - began < 30  # of which most is torch's import on a busy box; the deadline is 120 s


def test_an_interface_that_only_one_host_has(slurm: Cluster, tmp_path: Path) -> None:
    slurm.disturbed = True
    slurm.run(*slurm.exec("node0", "ip", "link", "set", "eth1", "down"))
    slurm.run(*slurm.exec("node0", "ip", "link", "set", "eth1", "name", "ib0"))
    slurm.run(*slurm.exec("node0", "ip", "link", "set", "ib0", "up"))
    line = start(slurm, tmp_path, "interface: ib0")
    code, out, err = line.finish(DEADLINE_S)
    assert code == 1, out + err
    assert "interface 'ib0' of the cluster config does not exist on node1 (it has: lo 127.0.0.1, eth0 10.77.0.11" in err


def test_a_way_that_is_barred_is_said_by_the_rank_that_cannot_pass(slurm: Cluster, tmp_path: Path) -> None:
    """As by a firewall between the hosts, on the network that is not Slurm's."""
    slurm.disturbed = True
    slurm.run(*slurm.exec("node1", "ip", "route", "add", "prohibit", "10.78.0.10/32"))
    line = start(slurm, tmp_path, "interface: eth1", deadline_s=15)
    code, out, err = line.finish(DEADLINE_S)
    assert code == 1, out + err
    # Both give up 15 s after their own start, whichever was first; where both could say why, agent 1's word counts.
    alone = "1 of 2 agents came within 15 s; missing: agent 1 on node1; present: node0: agent 0"
    assert alone in err or "UnreachableError: agent 0 announced" in err, err
    said = (line.run_dir / "attempt-0" / "agent-1.log").read_text()
    assert re.search(r"agent 0 announced 10\.78\.0\.10:\d+ on node0, but it cannot be reached from here \(", said), said


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        (0, "RendezvousError: missing: rank 0 on node0, which has not come within 8 s"),
        (1, "1 of 2 ranks came within 8 s; missing: rank 1 on node1; present: node0: rank 0"),
    ],
)
def test_a_rank_that_does_not_come_is_named_with_its_host(
    absent: int, says: str, slurm: Cluster, tmp_path: Path
) -> None:
    line = start(slurm, tmp_path, "", "--env", f"ABSENT={absent}", deadline_s=8)
    code, out, err = line.finish(DEADLINE_S)
    assert code == 1, out + err
    assert says in err, err


def test_a_requeued_job_meets_although_the_old_port_is_still_held(slurm: Cluster, tmp_path: Path) -> None:
    """A process of the first attempt's rank 0 outlives it, on the same host, with the socket that listens."""
    line = start(slurm, tmp_path, "rendezvous_ports: 29520-29529", "leaves_behind=port")
    wait_until(lambda: (tmp_path / "left").exists(), "the first attempt has met", DEADLINE_S)
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    slurm.run("scontrol", "requeue", job)
    result = result_of(line)
    assert (result["attempt"], result["total"]) == (1, 4.0)
    old, new = announced(line, 0), announced(line, 1)
    assert old["host"] == new["host"] == "node0"
    assert (old["identity"], new["identity"]) == (f"{job}.0-0", f"{job}.1-1")
