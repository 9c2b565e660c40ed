"""A pipeline_mlp step beside torch.distributed.pipelining with the same schedule, stages and data.

Both sides are called as the training loop calls them: gradients zeroed, the schedule, the optimizer. Two ranks, so that
each has a core of its own on the smallest machine. (`pipeline_bubble` measures the schedules themselves, with stages
that sleep.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.benchmarks.rows import Row, Times, compare, now
from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.pipeline_mlp.config import CLASSES, PIXELS, Config, widths
from workloads.pipeline_mlp.engine import Engine
from workloads.pipeline_mlp.model import build, initialize
from workloads.pipeline_mlp.schedule import make
from workloads.pipeline_mlp.torch_engine import TorchEngine
from workloads.pipeline_mlp.train import make_optimizer

RANKS = 2
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
ROUNDS = 60
WARM_UP = 5
AT_MOST = 1.0


def stepper(kind: type[Any], config: Config, ctx: RunContext) -> Callable[[], None]:
    """One engine with modules and an optimizer of its own; returns its whole step."""
    schedule = make(config.schedule, RANKS, config.microbatches, config.stages)
    wide = widths(config, PIXELS, CLASSES)
    modules = build(config, ctx.mesh, ctx.device)
    modules.to_empty(device=ctx.device)
    initialize(modules, wide, config.seed, torch.float32)
    optimizer = make_optimizer(config, modules, ctx.device)
    example = torch.empty(config.global_batch_size // config.microbatches, PIXELS)
    engine = kind(list(modules), schedule, ctx.mesh.get_group("pp"), F.cross_entropy, example)
    mine = schedule.stages_on(ctx.rank)
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(config.global_batch_size, PIXELS, generator=generator) if 0 in mine else None
    y_B = torch.randint(CLASSES, (config.global_batch_size,)) if schedule.stages - 1 in mine else None

    def step() -> None:
        optimizer.zero_grad()
        engine.step(x_BD, y_B)
        optimizer.step()

    return step


def measure(ctx: RunContext, configs: list[Config], rounds: int) -> list[dict[str, list[Times]]]:
    """On every rank, by schedule: times of each side's steps; `ours` has one fewer, each between two of torch's."""
    measured = []
    for config in configs:
        sides = {"torch": stepper(TorchEngine, config, ctx), "ours": stepper(Engine, config, ctx)}
        times: dict[str, list[Times]] = {"ours": [], "torch": []}
        for turn in range(2 * (WARM_UP + rounds) + 1):
            side = "ours" if turn % 2 else "torch"
            dist.barrier()
            began = now()
            sides[side]()
            dist.barrier()
            if turn >= 2 * WARM_UP:
                times[side].append(now().since(began))
        measured.append(times)
    return measured


def main(rounds: int = ROUNDS) -> list[Row]:
    configs = [Config.model_validate({"schedule": schedule}) for schedule in SCHEDULES]
    ranks = run_world(measure, configs, rounds, sizes=(RANKS, 1), names=("pp", "dp"), deadline_seconds=600)
    rows = []
    for number, schedule in enumerate(SCHEDULES):
        ratio, detail = compare([by_schedule[number] for by_schedule in ranks], "torch")
        what = f"a pipeline_mlp step, {schedule}, {RANKS} ranks"
        against = "torch.distributed.pipelining"
        rows.append(Row(what=what, against=against, ratio=ratio, at_most=AT_MOST, detail=detail))
    return rows
