"""A user's workload that goes on from where it was, copied into a test's directory as `mine.py`.

It fails as it is told. What it comes to depends on every step of every rank, so that one lost or done twice shows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from workloads.base import WorkloadConfig, WorkloadEntry, total


class Config(WorkloadConfig):
    steps: int = 6
    fails: tuple[str, ...] = ()
    """ATTEMPT/STEP/RANK/WHAT: what a rank does at the beginning of a step; `any` attempt is every one."""
    pause_seconds: float = 0.0


def run(config: Config, ctx: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    saved = ctx.paths.checkpoint_dir / "progress.json"
    progress = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "total": 0.0}
    for step in range(progress["step"] + 1, config.steps + 1):
        for failure in config.fails:
            attempt, when, rank, what = failure.split("/", 3)
            if attempt in ("any", str(ctx.attempt)) and (int(when), int(rank)) == (step, ctx.rank):
                fail(what, ctx)
        value = torch.full((1,), (ctx.rank + 1) / 2**step, dtype=torch.float64)
        dist.all_reduce(value)
        progress = {"step": step, "total": progress["total"] * 1.5 + value.item()}
        stop = ctx.end_step({"step": step, "sum": total(float(ctx.rank))})
        if ctx.rank == 0:
            save(saved, progress)
        if stop:
            break
        time.sleep(config.pause_seconds)
    return {**progress, "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"]}


def save(path: Path, progress: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(progress))
    beside.rename(path)


def fail(what: str, ctx: Any) -> None:
    while what == "wait for the warning":
        time.sleep(0.1)
        if ctx.stop_requested:
            return
    if what == "raise":
        raise ValueError(f"the third layer is missing from {object()}")
    if what == "exit":
        sys.exit(3)
    if what == "ignore SIGTERM":  # so that it takes a while to end it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    os.kill(os.getpid(), signal.Signals[what])


ENTRY = WorkloadEntry(name="mine", config=Config, run=run, summary="A number, step by step.")
