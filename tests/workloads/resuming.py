"""Runs that fail and go on: what the workloads' tests of resumed runs share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.workloads.worlds import run_world
from workloads.base import RunContext


class FailedOnPurpose(Exception):
    pass


Attempt = tuple[Path, int, int | None]
"""A run's directory, the attempt's number, and the step after which it fails, before that can be saved; None: never."""


def attempts(run: Callable[..., Any], config: Any, *these: Attempt, **world: Any) -> list[dict[str, Any]]:
    """Makes attempts one after the other on the ranks of one world; what each came to on rank 0, {} where it failed."""
    first, *_ = these
    return run_world(_attempts, run, config, these, run_dir=first[0].parent, **world)[0]


def interrupted(run_dir: Path, *fails_after: int) -> list[Attempt]:
    """The attempts of one run: each fails after the given step, and one more goes on to the end."""
    return [(run_dir, number, step) for number, step in enumerate((*fails_after, None))]


def _attempts(ctx: RunContext, run: Callable[..., Any], config: Any, these: list[Attempt]) -> list[dict[str, Any]]:
    results = []
    for run_dir, number, fails_after in these:
        own = run_dir / f"attempt-{number}"
        own.mkdir(parents=True, exist_ok=True)
        changes = {"checkpoint_dir": run_dir / "checkpoints", "export_dir": run_dir / "export"}
        mine = replace(
            ctx,
            paths=replace(ctx.paths, run_dir=run_dir, metrics=own / "metrics.jsonl", attempt_dir=own, **changes),
            attempt=number,
            **{"step_hooks": [], "end_hooks": [], "save_requested": False, "resumed_from_step": None},
        )

        def fail(step: int, fails_after: int | None = fails_after) -> None:
            if step == fails_after:
                raise FailedOnPurpose

        mine.step_hooks.append(fail)
        result: dict[str, Any] = {}
        with contextlib.closing(mine), contextlib.suppress(FailedOnPurpose):
            result = {**run(config, mine), "resumed_from_step": mine.resumed_from_step}
            mine.settle()
        results.append(result)
    return results


def lines(run_dir: Path, attempt: int = 0) -> list[dict[str, Any]]:
    """An attempt's metrics, without what differs from run to run."""
    text = (run_dir / f"attempt-{attempt}" / "metrics.jsonl").read_text()
    timed = ("_seconds", "_per_second", "_bytes")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in rows]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []
