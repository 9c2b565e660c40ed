"""From what was measured to verdicts: tables of clusters, each with one fault, or several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from jobs.doctor import judge
from jobs.doctor.judge import Verdict

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "pydantic": "2.9.0", "pyyaml": "6.0", "numpy": "1.26"}
HERE = {"python": "3.11.7", "torch": "2.13.0"}


def cluster(hosts: int, changes: Mapping[int, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The answers of healthy hosts, but for what is changed, by their numbers."""
    names = [f"n{number}" for number in range(hosts)]
    answers = []
    for number, host in enumerate(names):
        others = [name for name in names if name != host]
        answer = {
            "number": number,
            "host": host,
            "versions": {"python": "3.11.7", "torch": "2.13.0", "pydantic": "2.9.0", "yaml": "6.0", "numpy": "1.26"},
            "unseen": [],
            "peers": {name: {"rtt_s": 2e-4, "ahead_s": 1e-5} for name in others},
            "names": {name: {"addresses": [f"10.0.0.{name[1:]}"], "real": [f"10.0.0.{name[1:]}"]} for name in others},
            "login": {"ahead_s": 0.01, "within_s": 0.1} if number == 0 else None,
            "disk": {"write_mb_s": 500.0, "read_mb_s": 900.0},
        }
        answers.append({**answer, **(changes or {}).get(number, {})})
    return answers


def verdicts(answers: list[dict[str, Any]], expected: int | None = None, **why: str) -> list[Verdict]:
    names = [f"n{number}" for number in range(len(answers) if expected is None else expected)]
    return judge.of_hosts(answers, names, why, HERE)


def lines(found: list[Verdict], but: str = "ok") -> list[str]:
    return [f"{verdict.level} {verdict.what}: {verdict.text}" for verdict in found if verdict.level != but]


def test_a_healthy_cluster() -> None:
    found = verdicts(cluster(3))
    assert [f"{verdict.what}: {verdict.text}" for verdict in found] == [
        "hosts: 3 hosts answered: n0, n1, n2",
        "software: Python 3.11.7, torch 2.13.0, as here",
        "run directory: each host sees what the others write",
        "network: each host reaches the others, there and back within 0.2 ms",
        "names: each host finds the others by name",
        "clocks: hosts agree within 0.1 ms, and with this machine within 0.11 s",
        "disk: run directory: write 500 MB/s, read 900 MB/s, all at once",
    ]
    assert {verdict.level for verdict in found} == {"ok"}


def test_one_host_has_nobody_to_be_compared_with() -> None:
    answers = cluster(1)
    answers[0]["login"] = None
    assert [verdict.what for verdict in verdicts(answers)] == ["hosts", "software", "run directory", "disk"]


NO_TORCH = {"versions": {**cluster(1)[0]["versions"], "torch": ""}}
OLD_TORCH = {"versions": {**cluster(1)[0]["versions"], "torch": "2.11.0"}}
BEHIND = {"n0": {"rtt_s": 2e-4, "ahead_s": 5.0}, "n1": {"rtt_s": 2e-4, "ahead_s": 5.0}}


@pytest.mark.parametrize(
    ("changes", "line", "bad"),
    [
        ({2: NO_TORCH}, "FAIL software: no torch on n2", ["n2"]),
        ({1: OLD_TORCH}, "FAIL software: n1 has torch 2.11.0, and others 2.13.0", ["n1"]),
        ({2: {"run_dir": "/x/doctor: No such file"}}, "FAIL run directory: n2: /x/doctor: No such file", ["n2"]),
        ({1: {"unseen": [2]}}, "FAIL run directory: n1: does not see what n2 wrote", ["n1"]),
        ({1: {"network": "no port is free"}}, "FAIL network: no port is free", ["n1"]),
        ({2: {"peers": BEHIND}}, "warn clocks: n2 is 5 s behind the others (to 0.1 ms)", []),
        (
            {2: {"disk": {"write_mb_s": 20.0, "read_mb_s": 900.0}}},
            "FAIL disk: n2 writes the run directory at 20 MB/s, the median is 500 MB/s",
            ["n2"],
        ),
        (
            {0: {"disk": {"write_mb_s": 500.0, "read_mb_s": 200.0}}},
            "warn disk: n0 reads the run directory at 200 MB/s, the median is 900 MB/s",
            [],
        ),
        ({0: {"disk": {"error": "No space left on device"}}}, "FAIL disk: n0: No space left on device", ["n0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_fault_is_one_line(changes: dict[int, dict[str, Any]], line: str, bad: list[str]) -> None:
    found = verdicts(cluster(3, changes))
    assert lines(found) == [line]
    assert judge.bad_hosts(found, 3) == bad
    assert all(verdict.advice for verdict in found if verdict.level != "ok")


def test_a_host_that_has_not_answered_is_named_with_slurms_words() -> None:
    found = verdicts(cluster(2), expected=3, n2="error: execve(): /env/python: No such file or directory")
    (line,) = lines(found)
    assert line == "FAIL hosts: n2 has not answered: error: execve(): /env/python: No such file or directory"
    assert judge.bad_hosts(found, 3) == ["n2"]


def test_no_host_has_answered() -> None:
    found = verdicts([], expected=2)
    assert len(lines(found)) == 2
    assert judge.bad_hosts(found, 2) == []  # not their fault


def test_what_most_hosts_lack_is_not_their_fault() -> None:
    found = verdicts(cluster(4, {0: NO_TORCH, 1: NO_TORCH, 3: NO_TORCH}))
    assert [verdict.level for verdict in found if verdict.what == "software"][:3] == ["FAIL"] * 3
    assert judge.bad_hosts(found, 4) == []


def test_other_versions_here_are_a_warning_unless_hosts_have_their_own_python() -> None:
    here = {"python": "3.11.7", "torch": "2.12.0"}
    (line,) = lines(judge.of_hosts(cluster(2), ["n0", "n1"], {}, here))
    assert line == "warn software: Python 3.11.7, torch 2.13.0; here torch 2.12.0"
    assert lines(judge.of_hosts(cluster(2), ["n0", "n1"], {}, None)) == []
    assert lines(judge.of_hosts(cluster(2), ["n0", "n1"], {}, {**here, "torch": ""})) == []  # a login node needs none


def test_connections_name_the_host_or_the_pair() -> None:
    answers = cluster(4)
    for number in (0, 1, 3):
        answers[number]["peers"]["n2"] = {"error": "10.0.0.2:29500 does not answer within 5 s"}
    found = verdicts(answers)
    assert lines(found) == ["FAIL network: n2 and n0, n1, n3 cannot connect: 10.0.0.2:29500 does not answer within 5 s"]
    assert judge.bad_hosts(found, 4) == ["n2"]
    answers = cluster(4)
    answers[1]["peers"]["n2"] = {"error": "10.0.0.2:29500: Connection refused"}
    found = verdicts(answers)
    assert lines(found) == ["FAIL network: n1 cannot connect to n2: 10.0.0.2:29500: Connection refused"]
    assert judge.bad_hosts(found, 4) == []


def test_a_wrong_name_is_a_line_for_all_hosts_that_have_it() -> None:
    answers = cluster(3)
    for number in (0, 1):
        answers[number]["names"]["n2"] = {"addresses": ["10.9.9.9"], "real": ["127.0.0.1", "10.0.0.2", "10.1.0.2"]}
    answers[2]["names"]["n0"] = {"error": "Name or service not known", "real": ["10.0.0.0"]}
    answers[2]["names"]["n1"] = {"addresses": ["10.1.0.1"], "real": ["10.0.0.1", "10.1.0.1"]}  # another network's
    assert lines(verdicts(answers)) == [
        "warn names: on n0, n1, n2 means 10.9.9.9, but it has 10.0.0.2, 10.1.0.2",
        "warn names: on n2, n0 is not known (Name or service not known)",
    ]


@pytest.mark.parametrize("hosts", [2, 3, 5])
@pytest.mark.parametrize("off", [0, 1])
def test_a_clock_that_is_off_is_told_from_those_that_are_right(hosts: int, off: int) -> None:
    """Also that of the first host, by which all are measured: of two hosts, this machine agrees with one."""
    answers, ahead = cluster(hosts), {f"n{number}": 90.0 if number == off else 0.0 for number in range(hosts)}
    for answer in answers:
        for peer, found in answer["peers"].items():
            found["ahead_s"] = ahead[peer] - ahead[answer["host"]]
    answers[0]["login"] = {"ahead_s": ahead["n0"], "within_s": 0.1}
    found = verdicts(answers)
    assert lines(found) == [f"FAIL clocks: n{off} is 90 s ahead of the others (to {'0' if off == 0 else '0.1'} ms)"]
    assert judge.bad_hosts(found, hosts) == [f"n{off}"]


def test_a_clock_that_cannot_be_told_to_be_off_is_not() -> None:
    """An answer through a slow file system: it may have been off by as much as it took."""
    answers = cluster(2, {0: {"login": {"ahead_s": 20.0, "within_s": 30.0}}})
    assert lines(verdicts(answers)) == []
    answers[0]["login"] = {"ahead_s": 90.0, "within_s": 1.0}
    found = verdicts(answers)
    assert lines(found) == ["FAIL clocks: this machine is 90 s behind the others (to 1 s)"]
    assert judge.bad_hosts(found, 2) == []


# --- links and devices ------------------------------------------------------------------------------------------------


def links(hosts: int, slow: Mapping[tuple[int, int], float]) -> dict[str, Any]:
    """Links of 10 GB/s, but for those that are slow, in one direction."""
    pairs = itertools.combinations(range(hosts), 2)
    return {"links": [{"hosts": (f"n{a}", f"n{b}"), "mb_s": (10_000.0, slow.get((a, b), 9900.0))} for a, b in pairs]}


@pytest.mark.parametrize("hosts", [3, 4, 9])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_host_whose_links_are_all_slow_is_named(hosts: int, bad: int) -> None:
    slow = {pair: 100.0 for pair in itertools.combinations(range(hosts), 2) if bad in pair}
    found = judge.of_job(links(hosts, slow), "", emulated=False)
    assert lines(found) == [f"FAIL links: n{bad}: 100 MB/s with {hosts - 1} hosts; others have 9.9 GB/s"]
    assert judge.bad_hosts(found, hosts) == [f"n{bad}"]


@pytest.mark.parametrize(("rate", "level"), [(100.0, "FAIL"), (3000.0, "warn")])
@pytest.mark.parametrize("hosts", [3, 4, 9])
def test_a_link_that_alone_is_slow_is_named(hosts: int, rate: float, level: str) -> None:
    found = judge.of_job(links(hosts, {(1, 2): rate}), "", emulated=False)
    shown = "100 MB/s" if rate == 100 else "3 GB/s"
    assert lines(found) == [f"{level} links: n1 - n2: {shown}; others have 9.9 GB/s"]
    assert judge.bad_hosts(found, hosts) == []


def test_a_bad_host_and_a_bad_link_elsewhere() -> None:
    slow = {pair: 50.0 for pair in itertools.combinations(range(6), 2) if 4 in pair} | {(0, 1): 60.0}
    assert lines(judge.of_job(links(6, slow), "", emulated=False)) == [
        "FAIL links: n4: 50 MB/s with 5 hosts; others have 9.9 GB/s",
        "FAIL links: n0 - n1: 60 MB/s; others have 9.9 GB/s",
    ]


def test_a_link_that_was_slow_only_beside_others_is_well() -> None:
    measured = links(3, {(0, 1): 100.0})
    measured["links"].append({"hosts": ("n0", "n1"), "mb_s": (10_000.0, 9800.0)})
    (verdict,) = judge.of_job(measured, "", emulated=False)
    assert (verdict.level, verdict.text) == ("ok", "3 pairs of 3 hosts: 9.8 to 9.9 GB/s each way")


def test_two_hosts_have_one_link_which_may_still_be_too_slow() -> None:
    assert lines(judge.of_job(links(2, {}), "", emulated=True)) == []
    found = judge.of_job(links(2, {(0, 1): 11.0}), "", emulated=False)
    assert lines(found) == ["warn links: 11 MB/s between hosts, too slow to train across them"]


def ranks(device: str, *tflops: float) -> dict[str, Any]:
    return {
        "ranks": [
            {"host": f"n{i // 2}", "local_rank": i % 2, "device": device, "tflops": t} for i, t in enumerate(tflops)
        ]
    }


def test_a_slow_gpu_is_named() -> None:
    found = judge.of_job(ranks("NVIDIA H100", 700, 690, 500, 710, 600, 705), "", emulated=False)
    assert lines(found) == [
        "FAIL GPU: n1 GPU 0 multiplies matrices at 500 TFLOP/s, the median is 700 TFLOP/s",
        "warn GPU: n2 GPU 0 multiplies matrices at 600 TFLOP/s, the median is 700 TFLOP/s",
    ]
    assert judge.bad_hosts(found, 3) == ["n1"]


def test_cpus_vary() -> None:
    measured = {**ranks("CPU", 0.08, 0.05), "all_reduce": {"bytes": 4e6, "seconds": 0.01}}
    found = judge.of_job(measured, "", emulated=False)
    assert lines(found, but="") == [
        "ok CPU: 2 ranks on CPU: 50 to 80 GFLOP/s in a matrix product",
        "ok links: none between hosts, since there is one host; --nodes N measures them",
        "ok all-reduce: 4 MB over 2 ranks in 10 ms: 400 MB/s per rank",
    ]


def test_a_job_that_failed_keeps_what_it_had_measured() -> None:
    found = judge.of_job(ranks("CPU", 0.08), "rank 1 on n1: the link between n0 and n1 does not work", emulated=False)
    assert [(verdict.level, verdict.what) for verdict in found][:2] == [("FAIL", "job"), ("ok", "CPU")]
    assert judge.of_job({}, "", emulated=False) == []


# --- the login machine ------------------------------------------------------------------------------------------------


LIMITS = {"PartitionName": "gpu", "State": "UP", "MaxTime": "1-00:00:00", "MaxNodes": "8", "TotalNodes": "20"}
SLURM = {"missing": [], "version": "slurm 23.11.4", "partition": "gpu", "limits": LIMITS, "up": 18, "known": ["gpu"]}
CONFIG = {"time": None, "max_time": None, "max_nodes": None}


@pytest.mark.parametrize(
    ("slurm", "config", "expected"),
    [
        ({}, {}, ["ok Slurm: slurm 23.11.4", "ok partition: gpu: 18 of 20 hosts are up; at most 1-00:00:00"]),
        ({"missing": ["sbatch", "sacct"]}, {}, ["FAIL Slurm: not on PATH: sbatch"]),
        ({"error": "no route"}, {}, ["FAIL Slurm: does not answer: no route"]),
        ({"up": 1}, {}, ["warn partition: gpu: 1 of 20 hosts are up; at most 1-00:00:00; 2 are asked for"]),
        ({"limits": None, "partition": "gpuu"}, {}, ["FAIL partition: there is no partition gpuu"]),
        ({"limits": {**LIMITS, "State": "DOWN"}}, {}, ["FAIL partition: gpu is DOWN"]),
        ({"limits": {**LIMITS, "MaxNodes": "1"}}, {}, ["FAIL partition: gpu allows 1 hosts, and 2 are asked for"]),
        (
            {"limits": {**LIMITS, "MaxTime": "UNLIMITED"}},
            {"time": "9-00"},
            ["ok partition: gpu: 18 of 20 hosts are up; no time limit"],
        ),
        ({}, {"time": "2-00"}, ["FAIL partition: gpu allows 1-00:00:00, and time is 2-00"]),
        (
            {},
            {"max_time": "2-00", "max_nodes": 16},
            [
                "warn partition: gpu allows 8 hosts, and max_nodes is 16",
                "warn partition: gpu allows 1-00:00:00, and max_time is 2-00",
            ],
        ),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_slurm_and_the_cluster_config(slurm: dict[str, Any], config: dict[str, Any], expected: list[str]) -> None:
    found = lines(judge.of_slurm({**SLURM, **slurm}, 2, {**CONFIG, **config}), but="")
    assert found[-len(expected) :] == expected


def test_the_run_directory_here() -> None:
    about = {"path": "/project/runs", "own": "ext4", "write_mb_s": 1234.0, "read_mb_s": 1.0}
    assert judge.of_run_directory_here(about, on_slurm=False).text == "can be written here, 1.23 GB/s"
    assert judge.of_run_directory_here(about, on_slurm=True).text.endswith("; on ext4, which is often a machine's own")
    full = judge.of_run_directory_here({**about, "error": "No space left on device"}, on_slurm=True)
    assert (full.level, full.text) == ("FAIL", "/project/runs: No space left on device")
