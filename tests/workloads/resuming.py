"""Runs that fail and go on: what the workloads' tests of resumed runs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext


def failing(ctx: RunContext, run: Callable[..., Any], config: Any, fails_after: int | None) -> Any:
    """Runs a workload on one rank, which fails at the end of a step, before that step can be saved."""

    def fail(step: int) -> None:
        if step == fails_after:
            raise RuntimeError("failed on purpose")

    ctx.step_hooks.append(fail)
    return {**run(config, ctx), "resumed_from_step": ctx.resumed_from_step}


def attempts(run: Callable[..., Any], config: Any, fails_after: list[int], run_dir: Path, **world: Any) -> list[Any]:
    """The attempts of one run: each fails after the given step, and one more goes on to the end; what that returned."""
    for number, step in enumerate(fails_after):
        failed_attempt(run, config, step, run_dir, number, **world)
    return attempt(run, config, run_dir, len(fails_after), **world)


def attempt(run: Callable[..., Any], config: Any, run_dir: Path, number: int, **world: Any) -> list[Any]:
    """One that goes on to the end."""
    return run_world(failing, run, config, None, run_dir=run_dir, attempt=number, **world)


def failed_attempt(run: Callable[..., Any], config: Any, step: int, run_dir: Path, number: int, **world: Any) -> None:
    with pytest.raises(WorldFailed, match="failed on purpose"):
        run_world(failing, run, config, step, run_dir=run_dir, attempt=number, **world)


def lines(run_dir: Path, attempt: int = 0) -> list[dict[str, Any]]:
    """An attempt's metrics, without what differs from run to run."""
    text = (run_dir / (f"attempt-{attempt}" if attempt else "") / "metrics.jsonl").read_text()
    timed = ("_seconds", "_per_second", "_bytes")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in rows]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []
