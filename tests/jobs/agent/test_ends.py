"""How a rank, an agent or the leader ends, and what is said of it: the same words locally and on Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.blame import VANISHED
from tests.jobs.submitting import Line, wait_until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

SHAPE = ("--nodes", "2", "--gpus-per-node", "2")
COLLECTIVE_TIMEOUT_S = 4


@dataclass
class Place:
    """Where jobs run."""

    submit: Callable[..., Line]
    hosts: tuple[str, str]
    memory_group: Callable[[int], Path]
    slurm: Any = None
    """The cluster; None where jobs run locally."""

    def limit_memory(self, limit_bytes: int) -> dict[str, Any]:
        """Sees to it that the next job has so little memory; further arguments for `submit`."""
        group = self.memory_group(limit_bytes) / "cgroup.procs"
        config = Path("quick.yaml").read_text()  # it takes a while to be used up, for which the others wait
        Path("quick.yaml").write_text(config.replace(f"_timeout_s: {COLLECTIVE_TIMEOUT_S}", "_timeout_s: 60"))
        if self.slurm is None:
            return {"preexec_fn": lambda: group.write_text(str(os.getpid()))}
        enter = f"command_prefix: [bash, -c, 'echo $$ >{group}; exec \"$@\"', enter]\n"
        with Path("quick.yaml").open("a") as config:
            config.write(enter)
        return {}


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def place(
    request: pytest.FixtureRequest,
    memory_group: Callable[[int], Path],  # first, so that it ends after what runs in it
    typed: Callable[..., Line],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    monkeypatch.chdir(tmp_path)
    on_slurm = request.param == "slurm"
    cluster = request.getfixturevalue("slurm") if on_slurm else None
    (tmp_path / "quick.yaml").write_text(
        f"executor: {request.param}\ncollective_timeout_s: {COLLECTIVE_TIMEOUT_S}\nwatchdog_timeout_s: 0\n"
    )
    words, options = ("--cluster", "quick.yaml"), {}
    if cluster is not None:
        words, options = (*words, "--wait"), {"env": cluster.env}
    name = "node" if on_slurm else "host"
    return Place(
        lambda *more, **popen: typed("mine:ENTRY", *words, *more, **options, **popen),
        (f"{name}0", f"{name}1"),
        memory_group,
        cluster,
    )


ENDS = {
    "raise": (3, "ValueError: the third layer is missing", True),
    "sys.exit": (3, "called sys.exit(3) before its work was done", True),
    "os._exit 0": (3, "called os._exit(0) before its work was done", True),
    "os._exit 3": (3, "called os._exit(3) before its work was done", True),
    "SIGKILL": (3, "killed by SIGKILL (out of memory, or someone's kill -9)", False),
    "SIGSEGV": (3, "killed by SIGSEGV", True),
    "out of memory": (3, "killed by SIGKILL: its host's memory, or the job's share of it, was used up", False),
    "watchdog": (0, "did not fail, but was still running (last in step 1 (data), ", False),
}
"""What rank 3 of 4 does in step 2: the rank that is the root cause, what is said of it, whether with a traceback."""


ON_SLURM = ("os._exit 0", "out of memory", "watchdog")
"""What Slurm could hide, or tell otherwise; tests/slurm/test_follow.py has raise, sys.exit and SIGKILL there."""


@pytest.mark.parametrize(
    ("place", "end"),
    [("local", end) for end in ENDS] + [pytest.param("slurm", end, marks=pytest.mark.slurm) for end in ON_SLURM],
    indirect=["place"],
)
def test_a_rank_that_ends_before_its_work_is_done_ends_the_job(end: str, place: Place) -> None:
    rank, says, has_traceback = ENDS[end]
    more = place.limit_memory(3 * 2**29) if end == "out of memory" else {}
    line = place.submit(*SHAPE, f"does={end}", "on_rank=3", "steps=100000", "pause_seconds=0.02", **more)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    failure = line.result()["failure"]
    assert (failure["rank"], failure["host"]) == (rank, place.hosts[rank // 2])
    assert failure["message"].startswith(says)
    last = err.splitlines()[-1]
    assert last.startswith(f"meshrun: error: the job failed: rank {rank} on {place.hosts[rank // 2]}: {says}")
    assert last.endswith(f"(log: {line.run_dir}/attempt-0/rank-{rank}.log)")
    assert ("in act" in failure["traceback"]) == has_traceback
    line.assert_nothing_left()


@pytest.mark.parametrize("place", ["local"], indirect=True)  # tests/slurm/test_hangs.py has one across hosts
def test_of_eight_ranks_the_one_that_hangs_is_named_with_its_phase(place: Place) -> None:
    line = place.submit("--nodes", "2", "--gpus-per-node", "4", "does=hang in data", "on_rank=5", "steps=100000")
    code, out, err = line.finish(120)
    assert code == 1, out + err
    says = f"rank 5 on {place.hosts[1]}: did not fail, but was still running (last in step 1 (data), "
    assert f"meshrun: error: the job failed: {says}" in err.splitlines()[-1]
    assert " gave up waiting" in err.splitlines()[-1]
    line.assert_nothing_left()


def test_a_rank_that_saves_in_a_thread_when_its_work_is_done_gets_to_finish(place: Place, tmp_path: Path) -> None:
    line = place.submit("--gpus-per-node", "2", "at_end=a script")
    code, out, err = line.finish(120)
    assert code == 0, out + err
    assert [(tmp_path / f"thread-{rank}").read_text() for rank in (0, 1)] == ["whole", "whole"]
    line.assert_nothing_left()


def test_a_death_after_the_work_is_a_warning(place: Place) -> None:
    line = place.submit("--gpus-per-node", "2", "at_end=a crash")
    code, out, err = line.finish(120)
    assert code == 0, out + err
    record = line.result()
    assert record["status"] == "done"
    (warning,) = record["warnings"]
    assert warning.startswith(f"rank 1 on {place.hosts[0]}: killed by SIGSEGV after its work was done")


def agents(line: Line) -> list[int]:
    """The agents of a run, as their logs say: an agent and its ranks look alike."""
    found = {}
    for pid in line.left():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = dict(
                item.partition(b"=")[::2] for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if item
            )
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"--agent" in words and b"srun" not in words[0]:
            found[pid] = (parent, int(variables.get(b"SLURM_PROCID", b"0")))
    return [pid for pid, (parent, _) in sorted(found.items(), key=lambda item: item[1][1]) if parent not in found]


@pytest.mark.parametrize("does", ["lose the pipe", "lose the pipe and raise", "write into the pipe"])
def test_what_a_workload_does_to_the_pipe_hides_nothing(does: str, typed: Callable[..., Line], tmp_path: Path) -> None:
    line = typed("mine:ENTRY", "--gpus-per-node", "2", "--executor", "local", f"does={does}")
    code, out, err = line.finish(120)
    record = line.result()
    if does == "lose the pipe and raise":
        assert (code, record["failure"]["kind"]) == (1, "error")
        assert "rank 1 on host0: ValueError: the third layer is missing" in err.splitlines()[-1]
    else:
        assert (code, record["status"], record.get("warnings")) == (0, "done", None), out + err
    if does.startswith("lose"):
        assert (tmp_path / "mine.bin").read_bytes() == b""


def test_a_store_that_is_killed_is_named(typed: Callable[..., Line]) -> None:
    line = typed("mine:ENTRY", *SHAPE, "--executor", "local", "steps=100000", "pause_seconds=0.05")
    line.wait_for_step(3)
    (agent,) = agents(line)
    ranks = {int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()}
    (store,) = [
        pid
        for pid in ranks
        if b"MESHRUN_PROCID" not in Path(f"/proc/{pid}/environ").read_bytes() and os.getpgid(pid) != pid
    ]
    os.kill(store, signal.SIGKILL)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    assert "the leader on host0: lost the process that holds the store" in err.splitlines()[-1]
    line.assert_nothing_left()


AGENT_ENDS = {
    "leader": (0, "the leader", "killed by SIGKILL (out of memory, or someone's kill -9)"),
    "agent": (1, "the agent", VANISHED),
}
"""Whose agent is killed: the host, what it is called, and what is said of it; a local job has the leader alone."""


@pytest.mark.parametrize("which", AGENT_ENDS)
def test_an_agent_that_is_killed_is_named_and_leaves_nothing(which: str, place: Place) -> None:
    number, who, says = AGENT_ENDS[which]
    if place.slurm is None and number > 0:
        pytest.skip("a local job has one agent, which is the leader")
    line = place.submit(*SHAPE, "steps=100000", "pause_seconds=0.05")
    line.wait_for_step(3)
    os.kill(agents(line)[number], signal.SIGKILL)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    log = line.run_dir / "attempt-0" / f"agent-{number}.log"
    assert err.splitlines()[-1] == (
        f"meshrun: error: the job failed: {who} on {place.hosts[number]}: {says} (log: {log})"
    )
    line.assert_nothing_left()
    if place.slurm is not None:
        job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
        wait_until(lambda: place.slurm.job_state(job) == "FAILED", "Slurm's word on the job")


@pytest.mark.slurm
def test_a_sigint_to_all_of_a_job_is_told_as_one(typed: Callable[..., Line], slurm: Any) -> None:
    line = typed("mine:ENTRY", "--wait", *SHAPE, "steps=100000", "pause_seconds=0.05", env=slurm.env)
    line.wait_for_step(3)
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    slurm.run("scancel", "--signal=INT", job)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    says = rf"the job failed: job {job} received SIGINT on node\d \(someone's scancel --signal=INT, or kill -INT\)"
    assert re.search(says, err.splitlines()[-1]), err
    line.assert_nothing_left()


def test_a_stop_that_the_agent_is_asked_for_ends_the_run_as_stopped(place: Place) -> None:
    line = place.submit(*SHAPE, "steps=100000", "pause_seconds=0.02")
    line.wait_for_step(3)
    os.kill(agents(line)[0], signal.SIGUSR1)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    record = line.result()
    assert record["status"] == "stopped"
    assert re.match(r"by request, after step \d+ of 100000", record["error"])
