"""A user's workload for tests of sweeps, copied into a test's directory as `mine.py`; one point may be told to fail."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from workloads.base import WorkloadConfig, WorkloadEntry, mean


class Config(WorkloadConfig):
    steps: int = 3
    lr: float = 0.5
    seed: int = 0
    fails: str = ""
    """The point that fails in step 2, as `LR SEED`, unless MENDED is set."""
    waits_for: str = ""
    """A file without which step 2 does not begin."""


def run(config: Config, ctx: Any) -> dict[str, Any]:
    import torch

    for step in range(1, config.steps + 1):
        fails = config.fails == f"{config.lr:g} {config.seed}" and "MENDED" not in os.environ
        if step == 2 and ctx.rank == 0 and fails:
            raise ValueError("it diverged")
        while step == 2 and config.waits_for and not (ctx.stop_requested or Path(config.waits_for).exists()):
            time.sleep(0.1)
        if ctx.end_step({"step": step, "loss": mean(torch.tensor(config.lr * config.seed / step))}):
            break
    return {"final_loss": ctx.last_metrics["loss"], "heldout_loss": config.lr * config.seed}


ENTRY = WorkloadEntry(name="mine", config=Config, run=run)
