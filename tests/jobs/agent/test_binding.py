"""Which CPUs each rank of a host gets: from what the kernel says to a set per rank."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.agent.binding import Host, bind, plan, read_host, visible_gpu_nodes
from jobs.cli.options import Options
from jobs.cli.resolve import resolve
from jobs.cluster import load_cluster
from jobs.errors import ClusterConfigError

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")

UNKNOWN = [None] * 8
HYPERTHREADS = {cpu: cpu % 4 for cpu in range(8)}
"""4 cores: CPU 0 and CPU 4 are the threads of one."""
TWO_NODES = {cpu: cpu // 4 for cpu in range(8)}


@pytest.mark.parametrize(
    ("cpus", "ranks", "cores", "parts"),
    [
        (range(8), 2, {}, ["0-3", "4-7"]),
        (range(7), 3, {}, ["0-2", "3-4", "5-6"]),  # the first ranks get one more
        (range(2), 2, {}, ["0", "1"]),
        ([3, 5, 64], 2, {}, ["3,5", "64"]),
        (range(8), 1, {}, ["0-7"]),
        (range(8), 4, HYPERTHREADS, ["0,4", "1,5", "2,6", "3,7"]),
        (range(8), 3, HYPERTHREADS, ["0-1,4-5", "2,6", "3,7"]),
        (range(8), 8, HYPERTHREADS, ["0", "4", "1", "5", "2", "6", "3", "7"]),  # fewer cores than ranks
        (range(1, 5), 4, HYPERTHREADS, ["1", "2", "3", "4"]),  # one thread of each core
        (range(8), 1, {cpu: cpu - cpu % 8 for cpu in range(8)}, ["0-7"]),  # eight threads a core, as POWER has
    ],
)
def test_whole_cores_in_equal_shares(cpus: range, ranks: int, cores: dict[int, int], parts: list[str]) -> None:
    assert bind(cpus, ranks, cores, {}, UNKNOWN) == [cpu_set(part) for part in parts]


def cpu_set(text: str) -> set[int]:
    ends = [part.partition("-") for part in text.split(",")]
    return {cpu for first, _, last in ends for cpu in range(int(first), int(last or first) + 1)}


def test_fewer_cpus_than_ranks_are_not_divided() -> None:
    assert bind({0, 1}, 3, {}, {}, UNKNOWN) is None
    assert bind((), 1, {}, {}, UNKNOWN) is None


@pytest.mark.parametrize(
    ("cpus", "gpu_nodes", "parts"),
    [
        (range(8), [0, 0, 1, 1], ["0-1", "2-3", "4-5", "6-7"]),
        (range(8), [1, 1, 0, 0], ["4-5", "6-7", "0-1", "2-3"]),
        (range(8), [1, 0, 1, 0], ["4-5", "0-1", "6-7", "2-3"]),
        (range(8), [1, None, 1, None], ["4-5", "0-1", "6-7", "2-3"]),
        (range(8), [9, 9, 1, 1], ["0-1", "2-3", "4-5", "6-7"]),  # a node without CPUs of this job's
        # Too few near: the others' share comes from the rest.
        (range(8), [1, 1, 1, 1], ["4,0", "5,1", "6,2", "7,3"]),
        (range(2, 8), [0, 0, 0, 1], ["2,5", "3,6", "7", "4"]),
        ([0, *range(4, 8)], [0, 0, 1], ["0,5", "6-7", "4"]),
    ],
)
def test_near_the_gpu_as_far_as_there_is_enough(cpus: range, gpu_nodes: list[int | None], parts: list[str]) -> None:
    assert bind(cpus, len(gpu_nodes), {}, TWO_NODES, gpu_nodes) == [cpu_set(part) for part in parts]


def test_every_cpu_once_and_shares_equal_whatever_the_host() -> None:
    for ranks in range(1, 9):
        for first in range(8):
            cpus = set(range(first, 16))
            nodes = {cpu: cpu // 5 for cpu in cpus}
            parts = bind(cpus, ranks, {}, nodes, [(rank * 3) % 4 for rank in range(ranks)])
            if len(cpus) < ranks:
                assert parts is None
                continue
            assert parts is not None
            assert set().union(*parts) == cpus
            sizes = [len(part) for part in parts]
            assert sum(sizes) == len(cpus)
            assert max(sizes) - min(sizes) <= 1


# --- whose CPUs they are ----------------------------------------------------------------------------------------------

ALL = frozenset(range(8))
HOST = Host(own=ALL, allowed=ALL, online=ALL, nodes=TWO_NODES)
STEP = {"SLURM_CPUS_ON_NODE": "8"}


def test_the_cpus_of_a_step_are_divided() -> None:
    parts, how = plan(STEP, 2, "auto", HOST)
    assert parts == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert how == "CPUs: each rank is bound to its own: rank 0 to 0-3, rank 1 to 4-7"


def test_a_part_of_the_host_is_the_jobs_own_where_slurm_counts_cores() -> None:
    """Then SLURM_CPUS_ON_NODE is half the number of the CPUs that its cpuset holds."""
    part = frozenset(range(4))
    parts, _ = plan({"SLURM_CPUS_ON_NODE": "2"}, 2, "auto", replace(HOST, own=part, allowed=part))
    assert parts == [{0, 1}, {2, 3}]


def test_near_the_gpus_and_how_many_are() -> None:
    parts, how = plan(STEP, 2, "auto", replace(HOST, gpu_nodes=(1, 0)))
    assert parts == [{4, 5, 6, 7}, {0, 1, 2, 3}]
    assert "2 of 2 ranks have only CPUs of their GPU's NUMA node" in how
    _, how = plan(STEP, 2, "auto", replace(HOST, gpu_nodes=(1, 1)))
    assert "0 of 2 ranks" in how
    parts, _ = plan(STEP, 4, "auto", replace(HOST, gpu_nodes=(1, 0)))  # two ranks a GPU
    assert parts == [{4, 5}, {0, 1}, {6, 7}, {2, 3}]


@pytest.mark.parametrize("binding", ["auto", "none"])
@pytest.mark.parametrize("allowed", [ALL, frozenset({0, 1, 2, 3})])
def test_a_binding_of_the_agent_alone_is_lifted(binding: str, allowed: frozenset[int]) -> None:
    """As SLURM_CPU_BIND does it, inherited by a job that was submitted from inside `srun -c1`."""
    host = replace(HOST, own=frozenset({0}), allowed=allowed)
    parts, how = plan({"SLURM_CPUS_ON_NODE": "4"}, 2, binding, host)  # type: ignore[arg-type]
    assert parts is not None
    if binding == "auto" and allowed != ALL:
        assert parts == [{0, 1}, {2, 3}]
    else:  # which 4 of the 8 are ours is not known
        assert parts == [set(allowed)] * 2
        assert "(the agent was bound to 0)" in how


def test_more_ranks_than_cpus_share_them_all() -> None:
    assert plan(STEP, 9, "auto", HOST) == (None, "CPUs: not bound, the ranks share 0-7: fewer than 9 ranks")
    parts, _ = plan(STEP, 9, "auto", replace(HOST, own=frozenset({5})))
    assert parts == [set(ALL)] * 9


def test_a_host_shared_with_other_jobs_is_not_divided() -> None:
    """Ranks of two jobs that are pinned to the same cores wait for each other while other cores are idle."""
    for env in ({}, {"SLURM_CPUS_ON_NODE": "4"}):
        parts, how = plan(env, 2, "auto", HOST)
        assert parts is None
        assert how == "CPUs: not bound, the ranks share 0-7: other jobs may run on them, too"
        parts, how = plan(env, 2, "auto", replace(HOST, gpu_nodes=(1, 0)))
        assert parts == [{4, 5, 6, 7}, {0, 1, 2, 3}]
        assert how == "CPUs: each rank is bound to the NUMA node of its GPU: rank 0 to 4-7, rank 1 to 0-3"
    parts, _ = plan({}, 4, "auto", replace(HOST, gpu_nodes=(1, 0)))  # then the ranks take the CPU
    assert parts is None


def test_a_users_own_taskset_stands() -> None:
    assert plan({}, 2, "auto", replace(HOST, own=frozenset({3})))[0] is None


def test_none_binds_nothing() -> None:
    assert plan(STEP, 2, "none", replace(HOST, gpu_nodes=(1, 0)))[0] is None


def test_the_cluster_config_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line, binding in (("", "auto"), ("cpu_binding: none\n", "none")):
        (tmp_path / "site.yaml").write_text(f"executor: local\n{line}")
        given = Options(words=["tp_fsdp"], cluster="site.yaml", run_dir=str(tmp_path / "run"))
        assert resolve(given).spec.cpu_binding == binding
    (tmp_path / "site.yaml").write_text("cpu_binding: cores\n")
    with pytest.raises(ClusterConfigError, match=r"site\.yaml:1: .*cpu_binding.*'auto' or 'none'"):
        load_cluster(tmp_path / "site.yaml")


# --- what the kernel says ---------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cores_and_nodes_are_read(tmp_path: Path) -> None:
    system = tmp_path / "sys/devices/system"
    write(system / "cpu/online", "0-3\n")
    for cpu in range(4):
        write(system / f"cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}\n")
    write(system / "node/node0/cpulist", "0,2\n")
    write(system / "node/node1/cpulist", "1,3\n")
    write(system / "node/node2/cpulist", "\n")  # memory alone
    host = read_host({}, tmp_path)
    assert host.online == {0, 1, 2, 3}
    assert host.cores == {0: 0, 1: 1, 2: 0, 3: 1}
    assert host.nodes == {0: 0, 2: 0, 1: 1, 3: 1}
    assert host.gpu_nodes == ()


def test_a_kernel_that_tells_nothing(tmp_path: Path) -> None:
    host = read_host({}, tmp_path)
    assert host.own == host.online == os.sched_getaffinity(0)
    assert (host.cores, host.nodes, host.gpu_nodes) == ({}, {}, ())


def gpu(root: Path, address: str, minor: int, node: str) -> None:
    information = f"Model: \t\t NVIDIA H100\nBus Location: \t {address}\nDevice Minor: \t {minor}\n"
    write(root / "proc/driver/nvidia/gpus" / address / "information", information)
    write(root / "sys/bus/pci/devices" / address / "numa_node", node + "\n")
    write(root / f"dev/nvidia{minor}", "")


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({}, (0, None, 1)),  # in the order of PCI addresses
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, (1, 0)),
        ({"CUDA_VISIBLE_DEVICES": "2,7,0"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,GPU-9a"}, ()),
        ({"MESHRUN_DEVICE": "cpu"}, ()),
    ],
)
def test_gpus_by_cudas_numbers(tmp_path: Path, env: dict[str, str], nodes: tuple[int | None, ...]) -> None:
    gpu(tmp_path, "0000:c1:00.0", 0, "1")
    gpu(tmp_path, "0000:1b:00.0", 2, "0")
    gpu(tmp_path, "0000:43:00.0", 1, "-1")
    gpu(tmp_path, "0000:0a:00.0", 3, "0")
    (tmp_path / "dev/nvidia3").unlink()  # another job's, or not in this container
    assert visible_gpu_nodes(env, tmp_path) == nodes


BOUND = """
import os
from jobs.agent.binding import plan
cpus = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(cpus)})
env = {"SLURM_CPUS_ON_NODE": str(len(cpus))}
parts, how = plan(env, len(cpus), "auto")
assert os.sched_getaffinity(0) == {min(cpus)}, "reading the host left this process elsewhere"
used = set()
for part in parts or []:
    if os.fork() == 0:
        os.sched_setaffinity(0, part)
        assert os.sched_getaffinity(0) == part
        os._exit(0)
    assert os.wait()[1] == 0
    used |= part
assert len(used) == len(cpus), how
print(how)
"""


def test_on_this_machine_from_a_process_bound_to_one_cpu() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a single CPU cannot be divided")
    done = subprocess.run([sys.executable, "-c", BOUND], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "CPUs: " in done.stdout
