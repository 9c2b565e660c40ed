"""Environment variables become a rank, and all ranks become host-major numbers; whatever is set, never a traceback.

What the variables are is recorded on a real Slurm (tests/slurm/record.py), with the truth beside them.
"""

from __future__ import annotations

import dataclasses
import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import TopologyError
from jobs.rank.identity import RankInfo, local_env, srun_line
from jobs.rank.numbering import Placement, Seat, mesh_table, number_by_host, place, seat_table
from jobs.slurm.hostlist import expand_counts, expand_hosts
from workloads.base import MeshSpec


@dataclass(frozen=True)
class Recorded:
    """One process of a recorded step, or of a shell that is none."""

    env: dict[str, str]
    ancestry: tuple[tuple[int, str], ...]
    rank: int | None
    """None: it is no rank."""
    node: str = ""
    world: str = ""
    """The step, as the recorder started it."""


def _read(path: Path) -> list[Recorded]:
    value = json.loads(path.read_text())
    return [
        Recorded(
            env=value["shared"] | one["env"],
            ancestry=tuple((pid, name) for pid, name in one["ancestry"]),
            **(one["truth"] or {"rank": None}),
        )
        for one in value["processes"]
    ]


CORPUS = {path.stem: _read(path) for path in sorted((Path(__file__).parent / "recorded").glob("*.json"))}
RANKS = {kind: [one for one in found if one.rank is not None] for kind, found in CORPUS.items()}
SHELLS = {kind: [one for one in found if one.rank is None] for kind, found in CORPUS.items()}
EVEN = sorted(kind for kind, found in RANKS.items() if found and "uneven" not in kind and "het" not in kind)
RECORDED = [one.env for one in CORPUS["block"]]
JOB = RECORDED[0]["SLURM_JOB_ID"]
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


# --- recorded ranks ---------------------------------------------------------------------------------------------------


def worlds(found: Sequence[Recorded]) -> list[list[Recorded]]:
    """The recorded ranks step by step, each in the order of its ranks."""
    names = sorted({one.world for one in found})
    return [sorted((one for one in found if one.world == name), key=lambda one: one.rank or 0) for name in names]


def read(one: Recorded, *without: str) -> RankInfo:
    env = {name: value for name, value in one.env.items() if name not in without}
    return RankInfo.from_env(env, one.ancestry)


def test_the_corpus_is_what_it_was_meant_to_be() -> None:
    assert len(CORPUS) >= 35
    assert {kind for kind, found in SHELLS.items() if found} == set(REFUSED)
    layouts = {kind: [one.node for one in worlds(RANKS[kind])[0]] for kind in EVEN}
    assert layouts["block"] == ["node0"] * 4 + ["node1"] * 4
    assert layouts["cyclic"] == ["node0", "node1"] * 2
    assert layouts["plane"] == ["node0", "node0", "node1", "node1"] * 2
    assert layouts["arbitrary"] == ["node1", "node0", "node0", "node1"]
    assert len(set(layouts["shared-host"])) == 3
    sizes = sorted(Counter(one.node for one in RANKS["uneven"]).values())
    assert sizes == [1, 7]


@pytest.mark.parametrize("kind", sorted(kind for kind, found in RANKS.items() if found))
def test_every_recorded_rank_is_told_who_it_is(kind: str) -> None:
    identities = []
    for world in worlds(RANKS[kind]):
        infos = [read(one) for one in world]
        assert [info.rank for info in infos] == [one.rank for one in world] == list(range(len(world)))
        nodes = [one.node for one in world]
        for info, one in zip(infos, world, strict=True):
            assert (info.world_size, info.local_world_size) == (len(world), nodes.count(one.node))
            assert info.expected_hosts in ((), tuple(other.host for other in infos))
        # Nodes are told apart as they should be, and by the host's own name where it has but one.
        assert len(set(zip(nodes, [info.host for info in infos], strict=True))) == len(set(nodes))
        for node in set(nodes):
            mates = [info for info, other in zip(infos, nodes, strict=True) if other == node]
            assert sorted(info.local_rank for info in mates) == list(range(len(mates)))
            assert {info.host for info in mates} == {node} or " " in node or infos[0].launcher == "torchrun"
        (identity,) = {info.identity for info in infos}
        identities.append(identity)
        assert all(info.network_peer for info in infos if info.launcher == "slurm")
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("kind", ["block", "cyclic", "array", "subset", "requeued", "host-lists-batch", "salloc-shell"])
def test_the_host_of_every_rank_is_known_beforehand_where_the_distribution_tells(kind: str) -> None:
    for world in worlds(RANKS[kind]):
        assert {read(one).expected_hosts for one in world} == {tuple(one.node for one in world)}


def test_a_recorded_slurm_step_of_two_hosts() -> None:
    assert RankInfo.from_env(RECORDED[5]) == RankInfo(
        launcher="slurm",
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        host="node1",
        job_id=JOB,
        step_id="0",
        attempt=0,
        node_rank=1,
        expected_hosts=("node0",) * 4 + ("node1",) * 4,
        network_peer="10.77.0.10",
    )


def test_the_two_incarnations_of_a_requeued_job_are_two_attempts() -> None:
    (after,), (before,) = ({(read(one).job_id, read(one).attempt) for one in w} for w in worlds(RANKS["requeued"]))
    assert before[0] == after[0]
    assert (before[1], after[1]) == (0, 1)


def test_a_heterogeneous_job_has_one_number_on_all_its_ranks() -> None:
    for world in worlds(RANKS["het-batch"]):
        assert {read(one).job_id for one in world} == {world[0].env["SLURM_JOB_ID_HET_GROUP_0"]}


@pytest.mark.parametrize("kind", sorted(kind for kind, found in RANKS.items() if found and "torchrun" not in kind))
def test_without_the_list_of_ranks_a_host_has_as_many_as_the_steps_table_says(kind: str) -> None:
    for one in RANKS[kind]:
        assert read(one, "SLURM_GTIDS").local_world_size == read(one).local_world_size
        if read(one).world_size > 1:
            with pytest.raises(TopologyError, match="SLURM_GTIDS is not set"):
                read(one, "SLURM_GTIDS", "SLURM_STEP_TASKS_PER_NODE")


def test_without_the_list_of_ranks_an_uneven_table_needs_the_hosts_name_in_it() -> None:
    one = RANKS["uneven"][0]
    for change in ({"SLURMD_NODENAME": "other"}, {"SLURM_STEP_NODELIST": "node[0-2]"}, {"SLURM_STEP_NUM_TASKS": "9"}):
        with pytest.raises(TopologyError, match=r"SLURM_STEP_TASKS_PER_NODE='7,1' does not tell how many"):
            RankInfo.from_env(without(one.env | change, "SLURM_GTIDS"), one.ancestry)


# --- whose variables are they? ----------------------------------------------------------------------------------------

LINE = "--distribution=block --kill-on-bad-exit=1 --wait=0 python -m jobs.job WORKLOAD"
REFUSED = {
    "batch-shell": ["is allocated, but", "it is the batch script", f"`srun --nodes=2 --ntasks-per-node=2 {LINE}"],
    "salloc-shell": ["a shell that salloc started", f"`srun --nodes=2 --ntasks-per-node=2 --cpus-per-task=2 {LINE}"],
    "interactive-step": ["it is the interactive shell", f"`srun --nodes=2 --ntasks-per-node=2 {LINE}"],
    "het-batch": ["it is the batch script", f"`srun --het-group=0-1 {LINE}"],
    "nested-batch": ["SLURM_STEP_ID=0", "is inherited", "batch script", f"`srun --nodes=1 --ntasks-per-node=2 {LINE}"],
    "nested-salloc": ["SLURM_STEP_ID=0", "is inherited", "salloc", f"`srun --nodes=1 --ntasks-per-node=2 {LINE}"],
    "another-steps-variables": ["is another's", ".1, so the variables were carried over"],
    "another-ranks-variables": ["SLURM_TASK_PID=", "another rank of step"],
    "detached": ["is left over: no slurmstepd is above this process"],
    "saved": ["is left over: no slurmstepd is above this process"],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_recorded_shell_is_refused_and_told_what_to_do(kind: str) -> None:
    for one in SHELLS[kind]:
        with pytest.raises(TopologyError) as caught:
            read(one)
        assert "\n" not in str(caught.value)
        for words in REFUSED[kind]:
            assert words in str(caught.value)


def test_without_the_ancestry_only_the_shells_own_variables_speak() -> None:
    believed = set()
    for kind, found in SHELLS.items():
        for one in found:
            try:
                RankInfo.from_env(one.env)
                believed.add(kind)
            except TopologyError:
                pass
    assert believed == {
        "another-steps-variables",
        "another-ranks-variables",
        "detached",
        "saved",
    }


def test_the_line_to_run_has_the_command_that_was_given() -> None:
    (one,) = SHELLS["salloc-shell"]
    with pytest.raises(TopologyError, match=r"--kill-on-bad-exit=1 --wait=0 python -m jobs.job mine:ENTRY steps=2`"):
        RankInfo.from_env(one.env, one.ancestry, "python -m jobs.job mine:ENTRY steps=2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "--nodes=2 --ntasks-per-node=2 --cpus-per-task=2 "),
        ({"SLURM_TASKS_PER_NODE": "7,1", "SLURM_GPUS_PER_NODE": ""}, "--ntasks-per-node=1 "),  # more would not fit
        # Nobody asked for ranks, but for GPUs, and there are 4 CPUs a host.
        ({"SLURM_TASKS_PER_NODE": "4(x0)"}, "--ntasks-per-node="),  # said nowhere, and no traceback
        ({"SLURM_TASKS_PER_NODE": "1(x2)"}, "--ntasks-per-node=2 "),
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_PER_NODE": "4"}, "--ntasks-per-node=1 "),
        (
            {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_PER_NODE": "a100:4", "SLURM_CPUS_PER_TASK": ""},
            "--ntasks-per-node=4 ",
        ),
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_PER_NODE": ""}, "--ntasks-per-node=1 "),
        # It is there to be pasted into a shell: numbers only.
        (
            {"SLURM_TASKS_PER_NODE": "$(rm -r .)", "SLURM_CPUS_PER_TASK": "`x`", "SLURM_JOB_NUM_NODES": ";x"},
            "srun --nodes=2 --ntasks-per-node=2 --d",
        ),
    ],
)
def test_the_line_to_run_fits_the_allocation(change: dict[str, str], words: str) -> None:
    (one,) = SHELLS["salloc-shell"]
    assert words in srun_line(one.env | change, "x")


@pytest.mark.parametrize(
    "title", ["[J.0]", "[J.0+1]", "[J.0 stepmgr]", "[StepId=J.0]", "[J.TBD]", "somehow else"], ids=lambda title: title
)
def test_titles_of_other_slurm_versions(title: str) -> None:
    own, _, *above = RANKS["block"][0].ancestry
    ancestry = [own, (20, "slurmstepd: " + title.replace("J", JOB)), *above]
    assert RankInfo.from_env(RECORDED[0], ancestry).rank == 0


@pytest.mark.parametrize(
    ("title", "words"),
    [
        (f"[{JOB}.extern]", "in step 'extern'"),
        (f"[{JOB}.1]", f"this process is in step {JOB}.1"),
        ("[1.0]", "this process is in step 1.0"),
        (f"[{int(JOB) + 1}.0]", "is another's"),
    ],
)
def test_a_process_in_anything_but_its_own_step_is_refused(title: str, words: str) -> None:
    own, _, *above = RANKS["block"][0].ancestry
    with pytest.raises(TopologyError, match=words):
        RankInfo.from_env(RECORDED[0], [own, (20, f"slurmstepd: {title}"), *above])


@pytest.mark.parametrize(
    "above",
    [
        [],
        [(1, "tini")],  # a container's own processes
        [(7, "bash")],  # /proc mounted with hidepid: the next is somebody else's
        [(90, "/usr/bin/conmon"), (1, "systemd"), (0, "kernel")],  # a container with the host's processes
        [(90, "/usr/bin/containerd-shim-runc-v2"), (1, "systemd"), (0, "kernel")],
    ],
)
def test_where_the_step_may_be_hidden_its_variables_are_believed(above: list[tuple[int, str]]) -> None:
    assert RankInfo.from_env(RECORDED[0], [(8, "python"), *above]).rank == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_STEP_NODELIST": "node[1-2]"}, "node0 is not in SLURM_STEP_NODELIST=node[1-2]"),
        ({"SLURM_JOB_NODELIST": "node2"}, "node0 is not in SLURM_JOB_NODELIST=node2"),
        ({"SLURM_GTIDS": "0"}, "SLURM_GTIDS has 1 of the 4 ranks on node0"),
    ],
)
def test_where_the_step_is_hidden_its_variables_are_held_against_each_other(change: dict[str, str], words: str) -> None:
    for ancestry in ((), [(1, "python")]):
        with pytest.raises(TopologyError) as caught:
            RankInfo.from_env(RECORDED[0] | change, ancestry)
        assert f"SLURM_STEP_ID=0 of job {JOB} is another's: {words}; start the ranks with `srun" in str(caught.value)


def test_in_a_step_whose_variables_did_not_come_through() -> None:
    with pytest.raises(TopologyError, match=rf"in Slurm's step {JOB}.0, but .* did not come through"):
        RankInfo.from_env({}, RANKS["block"][0].ancestry)


# --- one rank ---------------------------------------------------------------------------------------------------------


def test_a_requeued_step_is_another_attempt() -> None:
    assert RankInfo.from_env(RECORDED[0] | {"SLURM_RESTART_COUNT": "2"}).attempt == 2


def test_two_steps_of_a_job_and_two_attempts_of_a_step_have_different_identities() -> None:
    names = {
        RankInfo.from_env(RECORDED[0] | {"SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": attempt}).identity
        for step in ("0", "1")
        for attempt in ("0", "1")
    }
    assert names == {f"{JOB}.0-0", f"{JOB}.0-1", f"{JOB}.1-0", f"{JOB}.1-1"}
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


def test_what_a_distribution_says_of_sockets_does_not_matter() -> None:
    for kind in ("block", "cyclic"):
        for one in RANKS[kind]:
            assert read(one).expected_hosts
            change = {"SLURM_DISTRIBUTION": f"{kind}:fcyclic"}
            assert RankInfo.from_env(one.env | change).expected_hosts == read(one).expected_hosts


def test_cyclic_goes_on_with_the_hosts_that_have_room_left() -> None:
    env = RECORDED[0] | {"SLURM_DISTRIBUTION": "cyclic", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "n[0-2]"}
    env |= {"SLURM_STEP_TASKS_PER_NODE": "3,1,2", "SLURMD_NODENAME": "n0", "SLURM_GTIDS": "0,3,5"}
    env |= {"SLURM_JOB_NODELIST": "n[0-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert RankInfo.from_env(env).expected_hosts == ("n0", "n1", "n2", "n0", "n2", "n0")


def test_expected_hosts_are_not_guessed_under_other_distributions() -> None:
    for change in ({"SLURM_DISTRIBUTION": "cyclic"}, {"SLURM_STEP_TASKS_PER_NODE": "4"}):
        assert RankInfo.from_env(RECORDED[0] | change).expected_hosts == ()
    for one in RANKS["cyclic"]:  # a variable that is left over, say
        assert RankInfo.from_env(one.env | {"SLURM_DISTRIBUTION": "block"}).expected_hosts == ()


def test_expected_hosts_are_not_guessed_in_a_heterogeneous_job() -> None:
    # Components on node1, node0 and node2: the last is by chance where blocks would have it.
    env = RECORDED[0] | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_GTIDS": "2"}
    env |= {"SLURM_STEP_NODELIST": "node[0-2]", "SLURMD_NODENAME": "node2", "SLURM_PROCID": "2"}
    env |= {"SLURM_JOB_NODELIST": "node[0-2]"}
    assert RankInfo.from_env(env).expected_hosts == ("node0", "node1", "node2")
    assert RankInfo.from_env(env | {"SLURM_HET_SIZE": "3"}).expected_hosts == ()


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


def test_the_launchers_in_their_order() -> None:
    below_an_agent = RANKS["torchrun"][0]
    bare = without(TORCHRUN, "TORCHELASTIC_RUN_ID")
    step, own_task = RECORDED[5], RANKS["block"][5].ancestry
    assert RankInfo.from_env(step | TORCHRUN | local_env(0, 1, 1, "9"), own_task).launcher == "local"
    assert read(below_an_agent).launcher == "torchrun"
    assert RankInfo.from_env(step | TORCHRUN).launcher == "torchrun"
    assert RankInfo.from_env(step | TORCHRUN, own_task).launcher == "slurm"  # left over: slurmstepd itself started it
    assert RankInfo.from_env(step | bare).launcher == "slurm"
    assert RankInfo.from_env(bare).launcher == "torchrun"
    (shell,) = SHELLS["batch-shell"]
    assert RankInfo.from_env(shell.env | bare, shell.ancestry).launcher == "torchrun"


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


LOCAL = local_env(1, 2, 2, "77")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, ["no launcher's variables", "srun"]),
        (without(RECORDED[0], "SLURM_STEP_ID"), [f"job {JOB} is allocated", "`srun --nodes=2 --ntasks-per-node=4 "]),
        (without(RECORDED[0], "SLURM_PROCID"), [f"job {JOB} is allocated"]),
        (RECORDED[0] | {"SLURM_PROCID": "x"}, ["SLURM_PROCID='x'", "whole number"]),
        (RECORDED[0] | {"SLURM_PROCID": "-1"}, ["SLURM_PROCID='-1'"]),
        (RECORDED[0] | {"SLURM_PROCID": "8"}, ["rank 8 of 8", "contradict"]),
        (RECORDED[0] | {"SLURM_LOCALID": "4"}, ["local rank 4 of 4 on node0"]),
        (RECORDED[0] | {"SLURM_STEP_NUM_TASKS": "0"}, ["SLURM_STEP_NUM_TASKS='0'", "whole number from 1"]),
        (without(RECORDED[0], "SLURMD_NODENAME"), ["SLURMD_NODENAME is not set"]),
        (without(RECORDED[0], "SLURM_JOB_ID"), ["SLURM_JOB_ID=''"]),
        (RECORDED[0] | {"SLURM_JOB_ID": "../../x"}, ["SLURM_JOB_ID='../../x'"]),
        (RECORDED[0] | {"SLURMD_NODENAME": "a b\nc"}, ["SLURMD_NODENAME='a b\\nc'", "without spaces"]),
        (
            RECORDED[0] | {"SLURM_GTIDS": "0,1,2,70"},
            ["SLURM_GTIDS='0,1,2,70' cannot be ranks of one host", "contradict"],
        ),
        (
            RECORDED[0] | {"SLURM_GTIDS": "0,1,2,2"},
            ["SLURM_GTIDS='0,1,2,2' cannot be ranks of one host", "contradict"],
        ),
        (RECORDED[0] | {"SLURM_GTIDS": "0,x"}, ["SLURM_GTIDS='0,x'", "0,1,2"]),
        (RECORDED[0] | {"SLURM_GTIDS": "1,0,2,3"}, ["rank 0 is not number 0 of SLURM_GTIDS='1,0,2,3'", "contradict"]),
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


_NAMES = sorted({name for found in CORPUS.values() for one in found for name in one.env} | set(TORCHRUN) | set(LOCAL))
_VALUES = st.one_of(
    st.integers(-2, 12).map(str),
    st.sampled_from(
        ["0", "1", "5", "", "node[0-1]", "node[0-", "4(x2)", "4(x", "block", "0,1", "²", "٣", "1e3", "9" * 20, "a\nb"]
    ),
    st.sampled_from(["4294967290", "1000000", "n[0-99999999]", "a[0-9999]b[0-9999]", "1(x9999999)", "9999999(x99999)"]),
    st.text(max_size=6),
    st.text("0123456789[]-,()xn", max_size=12),
)
_TITLES = st.sampled_from(["python", "bash", "salloc", "", f"slurmstepd: [{JOB}.0]", "slurmstepd: [1.batch]", "kernel"])
_EVERYTHING = [one for found in CORPUS.values() for one in found]


@settings(max_examples=600)
@given(
    base=st.one_of(
        st.sampled_from([({}, ()), (TORCHRUN, ()), (LOCAL, ())]),
        st.sampled_from(_EVERYTHING).map(lambda one: (one.env, one.ancestry)),
    ),
    ancestry=st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 40), _TITLES), max_size=5)),
    changes=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=8),
    removed=st.sets(st.sampled_from(_NAMES), max_size=3),
)
def test_any_environment_is_a_valid_rank_or_a_topology_error(
    base: tuple[dict[str, str], tuple[tuple[int, str], ...]],
    ancestry: list[tuple[int, str]] | None,
    changes: dict[str, str],
    removed: set[str],
) -> None:
    env = without(base[0] | changes, *removed)
    message = ""
    try:
        info = RankInfo.from_env(env, base[1] if ancestry is None else ancestry)
    except TopologyError as error:
        message = str(error)
    if message:
        assert len(message.splitlines()) == 1
        assert len(message) < 1000
        return
    assert 0 <= info.rank < info.world_size
    assert 0 <= info.local_rank < info.local_world_size <= info.world_size
    assert info.host
    assert info.job_id
    assert info.attempt >= 0
    assert info.identity
    assert len(info.expected_hosts) in (0, info.world_size)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NODELIST": "n[0-99999999]"},
        {"SLURM_STEP_NODELIST": "a[0-9999]b[0-9999]"},
        {"SLURM_STEP_NODELIST": "[" * 130_000},
        {"SLURM_STEP_NODELIST": "n[0-99999]" + "[1]" * 40_000},
        {"SLURM_STEP_NODELIST": "n[" + "1," * 60_000 + "1]"},
        {"SLURM_STEP_NODELIST": "n," * 60_000},
        {"SLURM_STEP_TASKS_PER_NODE": ",".join(["1(x9999999)"] * 9000)},
        {"SLURM_STEP_TASKS_PER_NODE": "9999999(x99999)", "SLURM_STEP_NODELIST": "n[0-99998]"},
        {"SLURM_STEP_TASKS_PER_NODE": "9999999(x99999)", "SLURM_GTIDS": ""},
        {"SLURM_GTIDS": ",".join(map(str, range(20_000)))},
        {"SLURM_STEP_NUM_TASKS": "9" * 100_000},
        local_env(0, 1, 1, "7") | {"MESHRUN_NTASKS": "1000000", "MESHRUN_NNODES": "1000000"},
    ],
    ids=lambda change: next(f"{name}={value[:20]}" for name, value in change.items()),
)
def test_no_value_takes_long_or_fills_the_memory(change: dict[str, str]) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        RankInfo.from_env(RECORDED[0] | change)
    except TopologyError:
        pass
    finally:
        seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert seconds < 2
    assert peak < 50e6


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


@pytest.mark.parametrize("text", ["", "4(2)", "1(x100001)", "x", "4(x2)x", "4,,1", "-1", "4 (x2)", "4(x0)"])
def test_bad_task_counts(text: str) -> None:
    with pytest.raises(TopologyError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand_counts(text)


def test_host_lists() -> None:
    assert expand_hosts("node[0-1]") == ["node0", "node1"]
    assert expand_hosts("rack[1-2]-n[01-02],gpu7") == ["rack1-n01", "rack1-n02", "rack2-n01", "rack2-n02", "gpu7"]
    assert expand_hosts("n[08-11,20]") == ["n08", "n09", "n10", "n11", "n20"]
    assert expand_hosts("n[1-2]-ib,x") == ["n1-ib", "n2-ib", "x"]
    assert expand_hosts("[1-2]n[9-10]") == ["1n9", "1n10", "2n9", "2n10"]
    assert expand_hosts("") == []


@pytest.mark.parametrize(
    "text", ["n[", "n]", "n[]", "n[a-b]", "n[2-1]", "n[1-]", "n[-1]", "n[1,]", "n[[1]]", "n[0-100000]"]
)
def test_bad_host_lists(text: str) -> None:
    with pytest.raises(TopologyError, match="cannot be read"):
        expand_hosts(text)


def test_host_lists_as_submitit_reads_them() -> None:
    from submitit.slurm.slurm import _parse_node_list

    lists = {
        one.env[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST") for one in _EVERYTHING if name in one.env
    }
    assert "gpu7,rack1-n02,rack2-n[01-02]" in lists
    for text in lists:
        assert expand_hosts(text) == list(_parse_node_list(text))


# --- numbering --------------------------------------------------------------------------------------------------------


def seats(*hosts: str) -> list[Seat]:
    """Scheduler ranks 0, 1, ... on these hosts, local ranks in the order of arrival."""
    seen: Counter[str] = Counter()
    made = []
    for rank, host in enumerate(hosts):
        made.append(Seat(rank, host, seen[host]))
        seen[host] += 1
    return made


def placed(ordered: Sequence[Seat], rank: int) -> Placement:
    return place(list(dict.fromkeys(seat.host for seat in ordered)), [seat.rank for seat in ordered], rank)


def test_block_stays_as_it_is() -> None:
    assert [s.rank for s in number_by_host(seats("a", "a", "b", "b"))] == [0, 1, 2, 3]


def test_cyclic_is_renumbered_host_by_host() -> None:
    ordered = number_by_host(seats("a", "b", "a", "b"))
    assert [s.rank for s in ordered] == [0, 2, 1, 3]
    assert [placed(ordered, rank).rank for rank in range(4)] == [0, 2, 1, 3]
    placement = placed(ordered, 1)
    assert dataclasses.asdict(placement) == {
        "rank": 2,
        "world_size": 4,
        "local_rank": 0,
        "local_world_size": 2,
        "node_rank": 1,
        "nodes": 2,
        "hosts": ("a", "a", "b", "b"),
    }


def test_scheduler_rank_0_stays_0_wherever_its_host_is_listed() -> None:
    ordered = number_by_host(seats("node1", "node1", "node0", "node0"))
    assert [s.host for s in ordered] == ["node1", "node1", "node0", "node0"]
    assert placed(ordered, 0).rank == 0


def test_unequal_hosts_are_refused_with_the_table() -> None:
    with pytest.raises(TopologyError) as caught:
        number_by_host(seats("a", "a", "a", "b"))
    assert "unequal numbers of ranks" in str(caught.value)
    assert "a: ranks 0 1 2; b: rank 3" in str(caught.value)


def test_mixed_devices_are_refused_by_name() -> None:
    mixed = [Seat(0, "a", 0, device="cuda"), Seat(1, "b", 0, device="cpu")]
    with pytest.raises(TopologyError, match="rank 0 on a: cuda, rank 1 on b: cpu"):
        number_by_host(mixed)


def test_ranks_of_a_host_that_took_the_same_gpu_are_refused_by_name() -> None:
    """Two GPUs, four ranks a host: local rank modulo what is visible. The GPUs' names are fakes."""
    doubled = [Seat(r, f"node{r // 4}", r % 4, "cuda", f"uuid-{r // 4}-{r % 2}") for r in range(8)]
    with pytest.raises(TopologyError) as caught:
        number_by_host(doubled)
    assert "ranks 0 2 on node0: uuid-0-0; ranks 1 3 on node0: uuid-0-1; ranks 4 6 on node1: " in str(caught.value)
    assert "--gpus-per-node" in str(caught.value)
    assert "\n" not in str(caught.value)
    each_its_own = [Seat(r, f"node{r // 4}", r % 4, "cuda", f"uuid-{r % 4}") for r in range(8)]
    unknown = [Seat(r, f"node{r // 4}", r % 4, "cuda") for r in range(8)]
    assert len(number_by_host(each_its_own)) == len(number_by_host(unknown)) == 8


def reported(world: Sequence[Recorded]) -> list[Seat]:
    """What the ranks of a recorded step would report to each other."""
    infos = [read(one) for one in world]
    return [Seat(info.rank, info.host, info.local_rank) for info in infos]


@pytest.mark.parametrize("kind", EVEN)
def test_recorded_steps_get_groups_within_hosts(kind: str) -> None:
    for world in worlds(RANKS[kind]):
        node_of = {one.rank: one.node for one in world}
        ordered = number_by_host(reported(world))
        per_host = placed(ordered, 0).local_world_size
        assert placed(ordered, 0).rank == 0
        for first in range(0, len(ordered), per_host):
            assert len({node_of[seat.rank] for seat in ordered[first : first + per_host]}) == 1


@pytest.mark.parametrize("kind", ["uneven", "uneven-cyclic", "het", "het-batch"])
def test_recorded_steps_of_unequal_hosts_are_refused_with_the_table(kind: str) -> None:
    refused = 0
    for world in worlds(RANKS[kind]):
        if len(set(Counter(one.node for one in world).values())) > 1:
            with pytest.raises(TopologyError, match=r"unequal numbers of ranks.* node\d: rank"):
                number_by_host(reported(world))
            refused += 1
    assert refused


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
    placements = [placed(ordered, seat.rank) for seat in ordered]
    assert [p.rank for p in placements] == list(range(len(where)))
    assert placed(ordered, 0).rank == 0
    for seat, p in zip(ordered, placements, strict=True):
        assert p.rank == p.node_rank * p.local_world_size + p.local_rank
        assert p.hosts[p.rank] == seat.host
        assert p.nodes * p.local_world_size == p.world_size
        # A host's ranks are consecutive: all of its block, and nobody else's.
        block = p.hosts[p.node_rank * p.local_world_size : (p.node_rank + 1) * p.local_world_size]
        assert set(block) == {seat.host}


def test_the_mesh_table() -> None:
    hosts = ["node0", "gpu-node1"]
    assert mesh_table(MeshSpec(("dp", "tp"), (2, 2)), hosts) == (
        "host       gpu 0       gpu 1\nnode0      0: dp0 tp0  1: dp0 tp1\ngpu-node1  2: dp1 tp0  3: dp1 tp1"
    )
