"""What `end_step` adds to a step of a tp_fsdp loop: metrics, phase, the agreement on stopping, the metrics file.

A step on shared cores takes 5% more or less from one time to the next, so a percent cannot be seen between steps with
`end_step` and steps without. Instead all ranks meet before it, and the time inside it is measured: waiting for a slower
rank is not its cost, as the next collective would have waited, too.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch.distributed as dist

from tests.benchmarks.rows import Row, milliseconds
from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.train import run

SHAPE = (2, 2)
ROUNDS = 60
WARM_UP = 5
AT_MOST = 1.01


def measure(ctx: RunContext, config: Config) -> tuple[list[float], list[float]]:
    """On every rank: seconds inside end_step, and of the rest of each step."""
    inside, rest = [], []
    end_step, began = ctx.end_step, time.perf_counter()

    def timed(metrics: Any) -> bool:
        nonlocal began
        dist.barrier()
        arrived = time.perf_counter()
        end_step(metrics)
        inside.append(time.perf_counter() - arrived)
        rest.append(arrived - began)
        dist.barrier()
        began = time.perf_counter()
        return False

    ctx.end_step = timed  # type: ignore[method-assign]
    run(config, ctx)
    return inside[WARM_UP:], rest[WARM_UP:]


def main(rounds: int = ROUNDS) -> list[Row]:
    settings = {"tp": SHAPE[1], "steps": WARM_UP + rounds, "eval_windows": 1, "sample_tokens": 0}
    measured = run_world(measure, Config.model_validate(settings), sizes=SHAPE, deadline_seconds=600)
    # What counts in a step is the rank that was in it for longest.
    inside = [max(step) for step in zip(*(inside for inside, _ in measured), strict=True)]
    rest = measured[0][1]
    return [
        Row(
            what="a tp_fsdp step with metrics, phase, stop",
            against="the same without",
            ratio=1 + statistics.median(inside) / statistics.median(rest),
            at_most=AT_MOST,
            detail=f"{milliseconds(inside)} in end_step, {milliseconds(rest)} in the rest of a step",
        )
    ]
