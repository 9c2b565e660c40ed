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

from tests.jobs.submitting import Line, wait_until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

SHAPE = ("--nodes", "2", "--gpus-per-node", "2")
COLLECTIVE_TIMEOUT_S = 4


@dataclass
class Place:
    """Where jobs run."""

    submit: Callable[..., Line]
    hosts: tuple[str, str]
    on_slurm: bool
    slurm: Any = None


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def place(request: pytest.FixtureRequest, typed: Callable[..., Line], tmp_path: Path) -> Place:
    on_slurm = request.param == "slurm"
    cluster = request.getfixturevalue("slurm") if on_slurm else None
    (tmp_path / "quick.yaml").write_text(f"executor: {request.param}\ncollective_timeout_s: {COLLECTIVE_TIMEOUT_S}\n")
    words, options = ("--cluster", "quick.yaml"), {}
    if cluster is not None:
        words, options = (*words, "--wait"), {"env": cluster.env}
    name = "node" if on_slurm else "host"
    return Place(
        lambda *more: typed("mine:ENTRY", *words, *more, **options), (f"{name}0", f"{name}1"), on_slurm, cluster
    )


ENDS = {
    "raise": (3, "ValueError: the third layer is missing", True),
    "sys.exit": (3, "called sys.exit(3) before its work was done", True),
    "os._exit 0": (3, "exited with code 0 before its work was done", False),
    "os._exit 3": (3, "exited with code 3 before its work was done", False),
    "SIGKILL": (3, "killed by SIGKILL (out of memory, or someone's kill -9)", False),
    "SIGSEGV": (3, "killed by SIGSEGV", False),
    "watchdog": (0, "did not fail, but still ran (last in step 1 (data), ", False),
}
"""What rank 3 of 4 does in step 2: the rank that is the root cause, what is said of it, whether with a traceback."""


@pytest.mark.parametrize("end", ENDS)
def test_a_rank_that_ends_before_its_work_is_done_ends_the_job(end: str, place: Place) -> None:
    rank, says, has_traceback = ENDS[end]
    line = place.submit(*SHAPE, f"does={end}", "on_rank=3", "steps=100000", "pause_seconds=0.02")
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


def test_of_eight_ranks_the_one_that_hangs_is_named_with_its_phase(place: Place) -> None:
    line = place.submit("--nodes", "2", "--gpus-per-node", "4", "does=hang in data", "on_rank=5", "steps=100000")
    code, out, err = line.finish(120)
    assert code == 1, out + err
    says = f"rank 5 on {place.hosts[1]}: did not fail, but still ran (last in step 1 (data), "
    assert f"meshrun: error: the job failed: {says}" in err.splitlines()[-1]
    assert " gave up waiting" in err.splitlines()[-1]
    line.assert_nothing_left()


def test_a_rank_that_saves_in_a_thread_when_its_work_is_done_gets_to_finish(place: Place, tmp_path: Path) -> None:
    line = place.submit("--gpus-per-node", "2", "at_end=a script")
    code, out, err = line.finish(120)
    assert code == 0, out + err
    assert [(tmp_path / f"thread-{rank}").read_text() for rank in (0, 1)] == ["whole", "whole"]


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


@pytest.mark.slurm
@pytest.mark.parametrize("number", [0, 1])
def test_an_agent_that_is_killed_is_named_and_leaves_nothing(number: int, typed: Any, slurm: Any) -> None:
    line = typed("mine:ENTRY", "--wait", *SHAPE, "steps=100000", "pause_seconds=0.05", env=slurm.env)
    line.wait_for_step(3)
    found = agents(line)
    assert len(found) == 2
    os.kill(found[number], signal.SIGKILL)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    what = "(the leader|rank 0)" if number == 0 else "the agent"
    assert re.search(rf"{what} on node{number}: ", err.splitlines()[-1]), err
    assert "kill" in err.splitlines()[-1].lower()
    line.assert_nothing_left()
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    wait_until(lambda: slurm.job_state(job) == "FAILED", "Slurm's word on the job")


def test_a_stop_that_the_agent_is_asked_for_ends_the_run_as_stopped(place: Place) -> None:
    line = place.submit(*SHAPE, "steps=100000", "pause_seconds=0.02")
    line.wait_for_step(3)
    os.kill(agents(line)[0], signal.SIGUSR1)
    code, out, err = line.finish(120)
    assert code == 1, out + err
    record = line.result()
    assert record["status"] == "stopped"
    assert re.match(r"by request, after step \d+ of 100000", record["error"])
