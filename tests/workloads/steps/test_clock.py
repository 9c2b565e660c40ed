"""What a step's time is: all that passes between two steps' ends, but for what is timed apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workloads.base import RunContext, RunPaths, mean, per_second
from workloads.steps import clock as step_clock
from workloads.steps.clock import StepClock


class Time:
    """Stands in for the clock: nothing passes but what is let pass."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(step_clock, "time", time)
    return time


def context(folder: Path) -> RunContext:
    names = ("", "metrics.jsonl", "data", "export", "checkpoints", "attempt-0")
    paths = RunPaths(*(folder / name for name in names))
    return RunContext(0, 1, 0, 1, 0, ("node0",), device=None, mesh=None, paths=paths)  # type: ignore[arg-type]


def test_every_second_is_counted_once_in_a_step_or_apart(time: Time) -> None:
    clock = StepClock(None)
    steps: list[dict[str, float]] = []
    for took in (10.0, 1.0, 4.0, 2.0):
        time.now += took
        if took == 4.0:
            for seconds in (0.5, 0.25):
                with clock.timed("evaluation"):
                    time.now += seconds
        steps.append(clock.read(clock.end_step()))
    with clock.timed("checkpoint"):
        time.now += 8
    assert steps == [
        {"first_step_seconds": 10.0},
        {"step_seconds": 1.0},
        {"step_seconds": 4.0, "evaluation_seconds": 0.75},
        {"step_seconds": 2.0},
    ]
    summary = clock.summary()
    assert summary == {
        "training_seconds": 17.0,
        "first_step_seconds": 10.0,
        "step_seconds": 2.0,
        "evaluation_seconds": 0.75,
        "checkpoint_seconds": 8.0,
    }
    assert clock.summary() == summary  # asked twice, nothing is counted twice
    clock.start()
    assert clock.summary() == {"training_seconds": 0.0, "first_step_seconds": None, "step_seconds": None}


def test_what_is_timed_apart_counts_also_where_it_fails(time: Time) -> None:
    clock = StepClock(None)

    def evaluate() -> None:
        with clock.timed("evaluation"):
            time.now += 3
            raise ValueError("evaluation")

    with pytest.raises(ValueError, match="evaluation"):
        evaluate()
    time.now += 1
    assert clock.read(clock.end_step()) == {"first_step_seconds": 1.0, "evaluation_seconds": 3.0}


def test_throughput_is_of_the_whole_step_and_a_first_step_has_none(time: Time, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    time.now += 50  # the model is built
    ctx.start_steps()
    called: list[int] = []
    ctx.step_hooks.append(called.append)
    for step in (1, 2):
        time.now += 4
        metrics: dict[str, Any] = {"step": step, "tokens_per_second": per_second(1000), "loss": mean(1.0)}
        with ctx.timed("evaluation"):
            time.now += 5
        time.now += 1  # the metrics
        ctx.end_step(metrics)
    ctx.settle()
    ctx.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    apart = {"evaluation_seconds": 5.0}
    assert rows == [
        {"step": 1, "loss": 1.0, "first_step_seconds": 5.0, **apart},
        {"step": 2, "tokens_per_second": 200.0, "loss": 1.0, "step_seconds": 5.0, **apart},
    ]
    assert ctx.timing()["evaluation_seconds"] == 10.0
    assert called == [1, 2]
