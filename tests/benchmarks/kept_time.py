"""How much of its time a run keeps that loses a rank every 60 s: 4 ranks, steps of 1 s, restarts in place.

    python -m tests.benchmarks.kept_time [--every 60] [--failures 4]

A rank that a seed picks kills itself (SIGKILL) at a moment that the clock picks, as a rule in the middle of a step. The
time lost per failure does not depend on how far failures are apart, as every step is saved; so the table's row takes it
from failures 15 s apart, and puts 60 s between them by computing. `--every 60` waits them out. What a step and its save
take beyond the second is lost, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.rows import Row
from workloads.base import RunContext, WorkloadEntry
from workloads.training.checkpoint import Checkpoint, ResumableConfig

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
STEP_S = 1.0
EVERY_S = 60.0
KEPT = 0.97


class Config(ResumableConfig):
    steps: int
    every_s: float
    failures: int
    began: Path
    """A file with the time of the first step's begin."""


def work(config: Config, ctx: RunContext) -> dict[str, Any]:
    """The workload: steps that take a second, after which their number is the state."""
    counter = torch.nn.Linear(1, 1)
    checkpoint = Checkpoint(ctx, config, model=counter)
    first = checkpoint.resume().step + 1
    if ctx.attempt == 0 and ctx.rank == 0:
        config.began.write_text(repr(time.time()))
    torch.distributed.barrier()
    dies_at = float(config.began.read_text()) + config.every_s * (ctx.attempt + 1)
    dies = ctx.attempt < config.failures and random.Random(ctx.attempt).randrange(ctx.world_size) == ctx.rank
    for step in range(first, config.steps + 1):
        until = time.time() + STEP_S
        if dies and until > dies_at:
            time.sleep(max(0.0, dies_at - time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(max(0.0, until - time.time()))
        ctx.end_step({"step": step})
        checkpoint.after_step(step, samples=step, is_last=step == config.steps)
    return {"ended": time.time()}


ENTRY = WorkloadEntry(name="kept_time", config=Config, run=work)


def measure(every_s: float, failures: int) -> tuple[float, float]:
    """Seconds that a failure costs on average, and that a step and its save take."""
    steps = round(every_s * (failures + 0.5) / STEP_S) - 4 * failures
    with tempfile.TemporaryDirectory() as folder:
        began = Path(folder) / "began"
        command = [sys.executable, str(ROOT / "submit.py"), "tests.benchmarks.kept_time:ENTRY", "--executor", "local"]
        command += ["--gpus-per-node", str(RANKS), "--run-dir", f"{folder}/run", "--json", f"began={began}"]
        command += ["--max-restarts", str(failures), f"steps={steps}", f"every_s={every_s}", f"failures={failures}"]
        words = [*command, "checkpoint.every_steps=1", "checkpoint.keep_last=1"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60 + 2 * every_s * (failures + 1))
        assert done.returncode == 0, done.stderr.decode()
        result = json.loads(done.stdout)
        assert result["attempt"] == failures, "it ended before its last failure"
        wall_s = result["result"]["ended"] - float(began.read_text())
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    each_s = statistics.median(line.get("step_seconds", STEP_S) + line.get("checkpoint_seconds", 0.0) for line in lines)
    print(f"  {steps} steps of {STEP_S:g} s in {wall_s:.1f} s, with {failures} failures", file=sys.stderr, flush=True)
    return (wall_s - steps * each_s) / failures, each_s


def main(every_s: float = 15.0, failures: int = 4) -> list[Row]:
    lost_s, each_s = measure(every_s, failures)
    kept = (EVERY_S - lost_s) / EVERY_S * STEP_S / each_s
    return [
        Row(
            what=f"a run of {RANKS} ranks that fails every {EVERY_S:g} s",
            against="the steps that it keeps",
            ratio=1 / kept,
            at_most=1 / KEPT,
            detail=f"{kept:.1%} of the time is kept; a failure costs {lost_s:.2f} s, at one per {every_s:g} s; a step "
            f"with its save takes {each_s:.3f} s",
        )
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=EVERY_S)
    parser.add_argument("--failures", type=int, default=4)
    given = parser.parse_args()
    print(main(given.every, given.failures)[0]["detail"])
