"""A user's workload that goes on from its checkpoints, copied into a test's directory.

What it comes to depends exactly on every step of every rank, so that a step that is lost or made twice shows.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from workloads.base import WorkloadEntry
from workloads.training.checkpoint import Checkpoint, ResumableConfig


class Config(ResumableConfig):
    steps: int = 1200
    pause_seconds: float = 0.1
    """After each step, until there is a file `go`."""
    dies_on: str = ""
    """A host on which a rank kills itself after its eighth step."""


def after(total: Any, step: int, of_all_ranks: Any) -> Any:
    """The total after a step."""
    return (3 * total + step * of_all_ranks) % 1_000_003


def expected(steps: int, of_all_ranks: int) -> int:
    """The total after all steps."""
    total = 0
    for step in range(1, steps + 1):
        total = after(total, step, of_all_ranks)
    return total


def run(config: Config, ctx: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    model = torch.nn.Module()
    model.register_buffer("total", torch.zeros(1, dtype=torch.int64))
    checkpoint = Checkpoint(ctx, config, model=model)
    for step in range(checkpoint.resume().step + 1, config.steps + 1):
        value = torch.tensor([ctx.rank + 1])
        dist.all_reduce(value)
        model.total.copy_(after(model.total, step, value))
        stop = ctx.end_step({"step": step})
        checkpoint.after_step(step, samples=step, is_last=step == config.steps)
        if step == 8 and ctx.host == config.dies_on:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop:
            break
        time.sleep(0 if Path("go").exists() else config.pause_seconds)
    return {"total": int(model.total)}


ENTRY = WorkloadEntry(name="checkpointed", config=Config, run=run, summary="A number, step by step.")
