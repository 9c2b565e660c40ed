"""Jobs that hang, with real ranks: which rank is named, and what is not taken for a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.submitting import Line

pytestmark = [pytest.mark.dist, pytest.mark.timeout(150)]

WORKLOAD = """
import ctypes, os, signal, time
from workloads.base import WorkloadConfig, WorkloadEntry, mean


class Config(WorkloadConfig):
    steps: int = 3
    does: str = "train"
    at: int = 2
    on_rank: int = 1
    slow_s: float = 0.0


def read(config):
    if config.does == "C":
        ctypes.CDLL(None).sleep(600)
    if config.does == "GIL":
        ctypes.PyDLL(None).sleep(600)
    if config.does == "SIGSTOP":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def run(config, ctx):
    import torch
    import torch.distributed as dist

    for step in range(1, config.steps + 1):
        ctx.phase("data")
        time.sleep(config.slow_s)
        if config.does == "evaluation":
            with ctx.timed("evaluation"):
                work(config, ctx, step)
        else:
            work(config, ctx, step)
        dist.all_reduce(torch.ones(1))
        ctx.end_step({"loss": mean(1.0)})
    return {}


def work(config, ctx, step):
    if config.does != "train" and step == config.at and ctx.rank == config.on_rank:
        read(config)


ENTRY = WorkloadEntry(name="mine", config=Config, run=run, summary="A number.")
"""
TWO = ("--gpus-per-node", "2")
EIGHT = ("--nodes", "2", "--gpus-per-node", "4")
COLLECTIVE_S = 15
"""Stacks that confirm a hang are taken at 0.8 of it."""


@pytest.fixture
def submit(typed: Callable[..., Line], tmp_path: Path) -> Callable[..., Line]:
    (tmp_path / "mine.py").write_text(WORKLOAD)
    (tmp_path / "quick.yaml").write_text(f"executor: local\ncollective_timeout_s: {COLLECTIVE_S}\n")
    return lambda *words: typed("mine:ENTRY", "--cluster", "quick.yaml", *words)


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(WORKLOAD.splitlines(), 1) if text in line)


def failure(line: Line) -> str:
    code, out, err = line.finish(100)
    assert code == 1, out + err
    line.assert_nothing_left()
    record = line.result()["failure"]
    assert record["kind"] == "hang"
    assert record["message"] in err.splitlines()[-1]
    return str(record["message"])


def test_of_eight_the_rank_that_hangs_is_named_and_the_others_are_grouped(submit: Callable[..., Line]) -> None:
    line = submit(*EIGHT, "--watchdog-timeout", "3", "does=sleep", "on_rank=5")
    message = failure(line)
    assert message.startswith(f"has been in data (mine.py:{line_of('time.sleep(600)')}, read) for ")
    assert f"; 7 ranks wait in all_reduce (mine.py:{line_of('dist.all_reduce')}) " in message
    record = line.result()["failure"]
    assert (record["rank"], record["host"]) == (5, "host1")
    assert "time.sleep(600)" in record["traceback"]
    stacks = (line.run_dir / "attempt-0" / "stacks.txt").read_text()
    assert message.endswith(f"(all stacks: {line.run_dir}/attempt-0/stacks.txt)")
    assert "--- rank 5 on host1: in data" in stacks
    assert "in all_reduce" in stacks


@pytest.mark.parametrize("does", ["C", "GIL", "SIGSTOP"])
def test_a_rank_in_c_or_stopped_is_named(does: str, submit: Callable[..., Line]) -> None:
    line = submit(*TWO, "--watchdog-timeout", "3", f"does={does}")
    message = failure(line)
    assert line.result()["failure"]["rank"] == 1
    where = {"C": "CDLL(None)", "GIL": "PyDLL(None)"}
    if does == "SIGSTOP":
        assert message.startswith("is stopped (SIGSTOP), and has been in data for ")
    else:
        assert message.startswith(f"has been in data (mine.py:{line_of(where[does])}, read) for ")


@pytest.mark.parametrize("words", [("does=sleep", "at=1"), ("does=evaluation",)], ids=["first step", "evaluation"])
def test_by_default_a_hang_is_found_before_the_collective_gives_up(
    words: tuple[str, ...], submit: Callable[..., Line]
) -> None:
    line = submit(*TWO, *words)
    message = failure(line)
    assert line.result()["failure"]["rank"] == 1
    phase = "evaluation" if words == ("does=evaluation",) else "data"
    assert message.startswith(f"has been in {phase} (mine.py:{line_of('time.sleep(600)')}, read) for ")


def test_slow_steps_are_no_hang(submit: Callable[..., Line]) -> None:
    code, out, err = submit(*TWO, "--watchdog-timeout", "6", "slow_s=3").finish()
    assert (code, err) == (0, ""), out


def test_a_suspended_job_does_not_hang(submit: Callable[..., Line]) -> None:
    line = submit(*TWO, "--watchdog-timeout", "4", "slow_s=0.5", "steps=10")
    line.wait_for_step(2)
    stopped = [pid for pid in line.left() if pid != line.process.pid]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    code, out, err = line.finish()
    assert (code, err) == (0, ""), out


def test_with_0_the_collective_gives_up(submit: Callable[..., Line]) -> None:
    line = submit(*TWO, "--watchdog-timeout", "0", "does=sleep")
    code, _, err = line.finish()
    assert code == 1
    assert " gave up waiting" in err.splitlines()[-1]
    assert not (line.run_dir / "attempt-0" / "stacks.txt").exists()
