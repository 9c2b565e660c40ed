"""Environment variables become a rank, and all ranks become host-major numbers; whatever is set, never a traceback."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import TopologyError
from jobs.topology import (
    RankInfo,
    Seat,
    expand_counts,
    expand_hosts,
    local_env,
    mesh_table,
    number_by_host,
    place,
    seat_table,
)
from workloads.base import MeshSpec

RECORDED = json.loads((Path(__file__).parent / "recorded" / "slurm-2x4.json").read_text())
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


# --- one rank ---------------------------------------------------------------------------------------------------------


def test_a_recorded_slurm_step_of_two_hosts() -> None:
    infos = [RankInfo.from_env(env) for env in RECORDED]
    assert infos[5] == RankInfo(
        launcher="slurm",
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        host="node1",
        job_id="332197",
        step_id=RECORDED[5]["SLURM_STEP_ID"],
        attempt=0,
        node_rank=1,
        expected_hosts=("node0",) * 4 + ("node1",) * 4,
        network_peer=RECORDED[5].get("SLURM_LAUNCH_NODE_IPADDR"),
    )
    assert [info.rank for info in infos] == list(range(8))
    assert all(info.host == info.expected_hosts[info.rank] for info in infos)


def test_a_requeued_step_is_another_attempt() -> None:
    assert RankInfo.from_env(RECORDED[0] | {"SLURM_RESTART_COUNT": "2"}).attempt == 2


def test_two_steps_of_a_job_and_two_attempts_of_a_step_have_different_identities() -> None:
    names = {
        RankInfo.from_env(RECORDED[0] | {"SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": attempt}).identity
        for step in ("0", "1")
        for attempt in ("0", "1")
    }
    assert names == {"332197.0-0", "332197.0-1", "332197.1-0", "332197.1-1"}
    assert RankInfo.from_env(TORCHRUN).identity == "abc-2"


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.77.0.1", "10.77.0.1"),
        ("127.0.0.1", None),
        ("0.0.0.0", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("node0", None),
        ("", None),
    ],
)
def test_the_launchers_address_is_a_peer_unless_it_leads_nowhere(address: str, peer: str | None) -> None:
    assert RankInfo.from_env(RECORDED[0] | {"SLURM_LAUNCH_NODE_IPADDR": address}).network_peer == peer


def test_a_step_on_part_of_a_job_goes_by_the_steps_variables() -> None:
    env = RECORDED[0] | {
        "SLURM_JOB_NUM_NODES": "7",
        "SLURM_JOB_NODELIST": "node[0-6]",
        "SLURM_NODELIST": "node[0-6]",
        "SLURM_NTASKS_PER_NODE": "28",
        "SLURM_NTASKS": "28",
    }
    assert RankInfo.from_env(env) == RankInfo.from_env(RECORDED[0])


def test_expected_hosts_are_not_guessed_under_other_distributions() -> None:
    for change in ({"SLURM_DISTRIBUTION": "cyclic"}, {"SLURM_STEP_TASKS_PER_NODE": "4"}):
        assert RankInfo.from_env(RECORDED[0] | change).expected_hosts == ()


def test_torchrun() -> None:
    info = RankInfo.from_env(TORCHRUN)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (5, 8, 1, 4)
    assert (info.host, info.job_id, info.attempt) == ("node1", "abc", 2)
    assert (info.master_addr, info.master_port) == ("node0", 29500)


def test_the_local_executors_variables_come_back() -> None:
    for rank in range(6):
        info = RankInfo.from_env(local_env(rank, 3, 2, "77", attempt=1))
        assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (rank, 6, rank % 2, 2)
        assert (info.host, info.node_rank, info.job_id, info.attempt) == (f"host{rank // 2}", rank // 2, "77", 1)
        assert info.expected_hosts == ("host0", "host0", "host1", "host1", "host2", "host2")


def test_the_innermost_launcher_counts() -> None:
    everything = RECORDED[5] | TORCHRUN | local_env(0, 1, 1, "9")
    assert RankInfo.from_env(everything).launcher == "local"
    assert RankInfo.from_env(RECORDED[5] | TORCHRUN).launcher == "slurm"


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


LOCAL = local_env(1, 2, 2, "77")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, ["no launcher's variables", "srun"]),
        (without(RECORDED[0], "SLURM_STEP_ID"), ["job 332197 is allocated", "`srun`"]),
        (without(RECORDED[0], "SLURM_PROCID"), ["job 332197 is allocated"]),
        (RECORDED[0] | {"SLURM_PROCID": "x"}, ["SLURM_PROCID='x'", "whole number"]),
        (RECORDED[0] | {"SLURM_PROCID": "-1"}, ["SLURM_PROCID='-1'"]),
        (RECORDED[0] | {"SLURM_PROCID": "8"}, ["rank 8 of 8", "contradict"]),
        (RECORDED[0] | {"SLURM_LOCALID": "4"}, ["local rank 4 of 4 on node0"]),
        (RECORDED[0] | {"SLURM_STEP_NUM_TASKS": "0"}, ["SLURM_STEP_NUM_TASKS='0'", "whole number from 1"]),
        (without(RECORDED[0], "SLURMD_NODENAME"), ["SLURMD_NODENAME is not set"]),
        (without(RECORDED[0], "SLURM_JOB_ID"), ["SLURM_JOB_ID is not set"]),
        (RECORDED[0] | {"SLURM_STEP_TASKS_PER_NODE": "4(x"}, ["SLURM_STEP_TASKS_PER_NODE='4(x'", "4(x2),1"]),
        (RECORDED[0] | {"SLURM_STEP_NODELIST": "node[0-"}, ["node[0-", "cannot be read"]),
        (RECORDED[0] | {"SLURM_STEP_NODELIST": "node[a-b]"}, ["node[a-b]", "cannot be read"]),
        (without(TORCHRUN, "MASTER_PORT"), ["MASTER_PORT=''"]),
        (without(TORCHRUN, "MASTER_ADDR"), ["MASTER_ADDR is not set"]),
        (TORCHRUN | {"RANK": "8"}, ["rank 8 of 8"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["1 of 9 on node1, 8 in all"]),
        (TORCHRUN | {"RANK": "9" * 5000}, ["RANK="]),
        (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT='70000'"]),
        (LOCAL | {"MESHRUN_NTASKS": ""}, ["MESHRUN_NTASKS=''"]),
        (LOCAL | {"MESHRUN_NNODES": "5"}, ["MESHRUN_NNODES", "contradict"]),
        (LOCAL | {"MESHRUN_NNODES": "3"}, ["contradict"]),
        (without(LOCAL, "MESHRUN_NODENAME"), ["MESHRUN_NODENAME is not set"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0][:30],
)
def test_missing_and_garbled_variables_are_one_clear_error(env: dict[str, str], words: list[str]) -> None:
    with pytest.raises(TopologyError) as caught:
        RankInfo.from_env(env)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


_NAMES = sorted({name for name in RECORDED[0] if name.startswith(("SLURM_", "SLURMD_"))} | set(TORCHRUN) | set(LOCAL))
_VALUES = st.one_of(
    st.integers(-2, 12).map(str),
    st.sampled_from(
        ["0", "1", "5", "", "node[0-1]", "node[0-", "4(x2)", "4(x", "block", "0,1", "²", "٣", "1e3", "9" * 20]
    ),
    st.text(max_size=6),
)


@settings(max_examples=400)
@given(
    base=st.sampled_from([{}, RECORDED[0], RECORDED[5], TORCHRUN, LOCAL]),
    changes=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=8),
    removed=st.sets(st.sampled_from(_NAMES), max_size=3),
)
def test_any_environment_is_a_valid_rank_or_a_topology_error(
    base: dict[str, str], changes: dict[str, str], removed: set[str]
) -> None:
    try:
        info = RankInfo.from_env(without(base | changes, *removed))
    except TopologyError:
        return
    assert 0 <= info.rank < info.world_size
    assert 0 <= info.local_rank < info.local_world_size <= info.world_size
    assert info.host
    assert info.job_id
    assert info.attempt >= 0
    assert len(info.expected_hosts) in (0, info.world_size)


def test_reading_the_environment_reads_no_global(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RECORDED[5].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError, match="no launcher's variables"):
        RankInfo.from_env({})


# --- Slurm's notations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [("4(x2)", [4, 4]), ("5,1", [5, 1]), ("2(x3),1", [2, 2, 2, 1]), ("1", [1]), ("3(x1),2(x2)", [3, 2, 2])],
)
def test_task_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "4(2)", "x", "4(x2)x", "4,,1", "-1", "4 (x2)"])
def test_bad_task_counts(text: str) -> None:
    with pytest.raises(TopologyError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand_counts(text)


def test_host_lists() -> None:
    assert expand_hosts("node[0-1]") == ["node0", "node1"]
    assert expand_hosts("rack[1-2]-n[01-02],gpu7") == ["rack1-n01", "rack1-n02", "rack2-n01", "rack2-n02", "gpu7"]
    assert expand_hosts("n[08-11,20]") == ["n08", "n09", "n10", "n11", "n20"]


# --- numbering --------------------------------------------------------------------------------------------------------


def seats(*hosts: str) -> list[Seat]:
    """Scheduler ranks 0, 1, ... on these hosts, local ranks in the order of arrival."""
    seen: Counter[str] = Counter()
    made = []
    for rank, host in enumerate(hosts):
        made.append(Seat(rank, host, seen[host]))
        seen[host] += 1
    return made


def test_block_stays_as_it_is() -> None:
    assert [s.rank for s in number_by_host(seats("a", "a", "b", "b"))] == [0, 1, 2, 3]


def test_cyclic_is_renumbered_host_by_host() -> None:
    ordered = number_by_host(seats("a", "b", "a", "b"))
    assert [s.rank for s in ordered] == [0, 2, 1, 3]
    assert [place(ordered, rank).rank for rank in range(4)] == [0, 2, 1, 3]
    placement = place(ordered, 1)
    assert dataclasses.asdict(placement) == {
        "rank": 2,
        "world_size": 4,
        "local_rank": 0,
        "local_world_size": 2,
        "node_rank": 1,
        "nodes": 2,
        "hosts": ("a", "a", "b", "b"),
        "scheduler_rank": 1,
    }


def test_scheduler_rank_0_stays_0_wherever_its_host_is_listed() -> None:
    ordered = number_by_host(seats("node1", "node1", "node0", "node0"))
    assert [s.host for s in ordered] == ["node1", "node1", "node0", "node0"]
    assert place(ordered, 0).rank == 0


def test_unequal_hosts_are_refused_with_the_table() -> None:
    with pytest.raises(TopologyError) as caught:
        number_by_host(seats("a", "a", "a", "b"))
    assert "unequal numbers of ranks" in str(caught.value)
    assert "a: ranks 0 1 2; b: rank 3" in str(caught.value)


def test_mixed_devices_are_refused_by_name() -> None:
    mixed = [Seat(0, "a", 0, device="cuda"), Seat(1, "b", 0, device="cpu")]
    with pytest.raises(TopologyError, match="rank 0 on a: cuda, rank 1 on b: cpu"):
        number_by_host(mixed)


@given(st.permutations(range(12)), st.integers(1, 5), st.data())
def test_any_seats_become_host_major_or_are_refused(order: list[int], hosts: int, data: st.DataObject) -> None:
    where = data.draw(st.lists(st.integers(0, hosts - 1), min_size=1, max_size=12))
    all_seats = seats(*(f"h{index}" for index in where))
    shuffled = [all_seats[i] for i in order if i < len(all_seats)]
    unequal = len(set(Counter(where).values())) > 1
    if unequal:
        with pytest.raises(TopologyError) as caught:
            number_by_host(shuffled)
        assert seat_table(all_seats) in str(caught.value)
        return
    ordered = number_by_host(shuffled)
    assert sorted(s.rank for s in ordered) == list(range(len(where)))
    placements = [place(ordered, seat.rank) for seat in ordered]
    assert [p.rank for p in placements] == list(range(len(where)))
    assert place(ordered, 0).rank == 0
    for seat, p in zip(ordered, placements, strict=True):
        assert p.rank == p.node_rank * p.local_world_size + p.local_rank
        assert p.hosts[p.rank] == seat.host
        assert p.nodes * p.local_world_size == p.world_size
        # A host's ranks are consecutive: all of its block, and nobody else's.
        block = p.hosts[p.node_rank * p.local_world_size : (p.node_rank + 1) * p.local_world_size]
        assert set(block) == {seat.host}


def test_the_mesh_table() -> None:
    hosts = ["node0", "node0", "gpu-node1", "gpu-node1"]
    assert mesh_table(MeshSpec(("dp", "tp"), (2, 2)), hosts) == (
        "host       gpu 0       gpu 1\nnode0      0: dp0 tp0  1: dp0 tp1\ngpu-node1  2: dp1 tp0  3: dp1 tp1"
    )
