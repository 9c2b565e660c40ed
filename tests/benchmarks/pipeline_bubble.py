"""The bubble of each schedule as measured, beside theory: our engine and torch.distributed.pipelining, in one run.

    python -m tests.benchmarks.pipeline_bubble [--quick] [--ranks 2 4 8] [--microbatches 4 8 16 32] [--steps 3]
                                               [--realtime] [--keep DIRECTORY]

Stages of known cost: they take 40 ms for a forward pass and 80 ms for a backward one, 40 for each of its halves, nearly
all of it asleep, so that 8 ranks share 2 cores honestly, and what is measured is the schedule and the engine. With
interleaving a rank has two such stages. All else is real: processes, gloo, autograd, microbatches of 4 KiB.

Each stage itself notes when it slept, by the host's one monotonic clock; so both engines are measured by the same
watch, and what autograd and Python do around a stage counts as bubble, which is 1 - (slept) / (ranks x time from the
first sleep's begin to the last one's end). The median of the steps counts, after a warm-up with short sleeps. For ours
there is also what its own timeline says, as a run prints it.

Exits with 1 where ours is over its limit: 2 points above theory, or, for zero_bubble, 1f1b's theory. It wants a quiet
machine: what else runs wakes the ranks late, and late on one rank is late on all. Where it is not quiet, --realtime
(root's) lets the ranks, which need a tenth of it, go before everything else.

Pipelines of 2 and of 4 ranks run side by side, as they are no more than one of 8. 9.5 minutes; --quick 40 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.workloads.worlds import run_world
from workloads.base import RunContext, WorkloadError
from workloads.pipeline_mlp import picture, split, theory, timeline
from workloads.pipeline_mlp.engine import Engine
from workloads.pipeline_mlp.schedule import SCHEDULES, make
from workloads.pipeline_mlp.torch_engine import TorchEngine

NAP_S = 0.04
"""Of a forward pass, and of each half of a backward one."""
WARM_UP_NAP_S = 0.001
CHUNKS = 2
"""Stages on a rank with interleaving."""
NAIVE_MICROBATCHES = 4
ROWS, WIDTH = 16, 64
"""Of a microbatch, fp32."""
POINTS = 2.0
"""Above theory, at most."""
ENGINES: dict[str, Any] = {"ours": Engine, "torch": TorchEngine}
LINE = "{:>5}  {:<12} {:>12}  {:>7} {:>7}  {:>6} {:>6}  {:>12}  {:>6} {:>6}"
HEAD = ("ranks", "schedule", "microbatches", "theory", "limit", "ours", "over", "its timeline", "torch", "over")

_nap_s = NAP_S
_naps: list[tuple[float, float]] = []
"""Of this rank, in the step under way: when each began and ended."""


@contextlib.contextmanager
def nap() -> Iterator[None]:
    """What is computed in here is part of the cost: the rest of it is slept."""
    began = time.monotonic()
    yield
    time.sleep(max(0.0, began + _nap_s - time.monotonic()))
    _naps.append((began, time.monotonic()))


class Sleeper(nn.Module):
    """A stage that adds a bias, and sleeps over it.

    Its backward pass has two halves that autograd can tell apart, as torch's zero bubble needs it, and that can be put
    off by `split`, as ours does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x_RW: Tensor) -> Tensor:
        with nap():
            if not x_RW.requires_grad and torch.is_grad_enabled():
                # The data; without this, no first stage would have an input's half, and be as busy as the others.
                x_RW = x_RW.detach().requires_grad_()
            if (later := split.current()) is not None:
                return _Add.apply(_NapBack.apply(x_RW), self.bias, later)
            return _NapBack.apply(x_RW) + _NapBack.apply(self.bias)


class _NapBack(torch.autograd.Function):
    """Passes on what it gets; half a backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with nap():
            return gradient


class _Add(torch.autograd.Function):
    """x + bias, the bias' half of the backward pass put off."""

    @staticmethod
    def forward(ctx: Any, x_RW: Tensor, bias_W: Tensor, later: split.Later) -> Tensor:
        ctx.bias, ctx.later = bias_W, later
        return x_RW + bias_W

    @staticmethod
    def backward(ctx: Any, gradient_RW: Tensor) -> tuple[Tensor, None, None]:
        bias = ctx.bias

        def weights() -> None:
            with nap():
                bias.grad = gradient_RW.sum(0) if bias.grad is None else bias.grad + gradient_RW.sum(0)

        split.now_or_later(ctx.later, weights, gradient_RW)
        return gradient_RW, None, None


@dataclass(frozen=True)
class Row:
    """Fractions: the bubble of one schedule in one shape."""

    schedule: str
    ranks: int
    microbatches: int
    theory: float
    limit: float
    measured: dict[str, float]
    """By engine; torch has not all."""
    own: float
    """What our engine's own timeline says."""
    naps_s: list[float]
    """How long each sleep in our engine's steps took, ascending."""

    def problem(self) -> str | None:
        worst = max(self.measured["ours"], self.own)
        if worst <= self.limit:
            return None
        middle, late, most = (1000 * self.naps_s[int(part * (len(self.naps_s) - 1))] for part in (0.5, 0.99, 1))
        return (
            f"{self.schedule}, {self.ranks} ranks, {self.microbatches} microbatches: bubble {100 * worst:.1f}%, limit "
            f"{100 * self.limit:.1f}%, theory {100 * self.theory:.1f}%; sleeps took {middle:.1f} ms at the median, "
            f"{late:.1f} at the 99th percentile, {most:.1f} at most (on a quiet machine, {1000 * NAP_S:.0f} to "
            f"{1000 * NAP_S + 1:.0f})"
        )

    def __str__(self) -> str:
        shown = [
            (f"{100 * self.measured[name]:.1f}%", f"{100 * (self.measured[name] - self.theory):+.1f}")
            if name in self.measured
            else ("-", "-")
            for name in ENGINES
        ]
        ours, torchs = shown
        fractions = [f"{100 * fraction:.1f}%" for fraction in (self.theory, self.limit, self.own)]
        text = LINE.format(self.ranks, self.schedule, self.microbatches, *fractions[:2], *ours, fractions[2], *torchs)
        return f"{text}  <- over its limit" if self.problem() else text


def in_theory(schedule: str, ranks: int, microbatches: int) -> float:
    """All naps are equally long, as the formulas want it: a backward pass is two forward ones, its halves are equal."""
    return theory.bubble_fraction(schedule, ranks, microbatches, CHUNKS if schedule == "interleaved" else 1)


def limit(schedule: str, ranks: int, microbatches: int) -> float:
    if schedule == "zero_bubble":
        return in_theory("1f1b", ranks, microbatches)
    return in_theory(schedule, ranks, microbatches) + POINTS / 100


def plan(microbatches: Sequence[int]) -> list[tuple[str, int]]:
    """naive's bubble is the same for all numbers of microbatches, and its steps are the longest: one is enough."""
    return [(s, m) for s in SCHEDULES for m in (microbatches if s != "naive" else [NAIVE_MICROBATCHES])]


def seconds(ranks: int, microbatches: Sequence[int], steps: int) -> float:
    """What the measured steps take, in theory."""
    total = 0.0
    for schedule, m in plan(microbatches):
        work = 3 * NAP_S * m * (CHUNKS if schedule == "interleaved" else 1)
        engines = 1 if schedule == "naive" or (schedule == "1f1b" and m < ranks) else 2
        total += steps * engines * work / (1 - in_theory(schedule, ranks, m))
    return total


def measure(ctx: RunContext, microbatches: Sequence[int], steps: int, keep: Path | None) -> list[Row]:
    """On every rank: all schedules, one after the other; rank 0 prints and returns the rows."""
    return [row for schedule, m in plan(microbatches) if (row := measure_one(ctx, schedule, m, steps, keep))]


def measure_one(ctx: RunContext, name: str, microbatches: int, steps: int, keep: Path | None) -> Row | None:
    ranks = ctx.world_size
    schedule = make(name, ranks, microbatches, ranks * (CHUNKS if name == "interleaved" else 1))
    engines = {}
    for engine, kind in ENGINES.items():
        set_nap(WARM_UP_NAP_S)
        stages = [Sleeper() for _ in schedule.stages_on(ctx.rank)]
        try:
            engines[engine] = kind(stages, schedule, dist.group.WORLD, F.mse_loss, torch.zeros(ROWS, WIDTH))
        except WorkloadError:  # torch has no such schedule
            continue
    inputs, targets = torch.zeros(2, microbatches * ROWS, WIDTH)
    mine: dict[str, list[Any]] = {engine: [] for engine in engines}
    for step in range(1 + steps):
        for engine, built in engines.items():
            set_nap(NAP_S if step else WARM_UP_NAP_S)
            dist.barrier()
            done = built.step(inputs, targets, record=True)
            due = 3 * microbatches * len(schedule.stages_on(ctx.rank))
            if step and len(_naps) != due:
                raise AssertionError(f"{name}, {engine}: rank {ctx.rank} slept {len(_naps)} times instead of {due}")
            if step:
                mine[engine].append((list(_naps), done.events))
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, mine)
    if ctx.rank:
        return None

    measured, own = {}, 0.0
    for engine in engines:
        by_step = [[theirs[engine][step] for theirs in gathered] for step in range(steps)]
        measured[engine] = statistics.median(slept([naps for naps, _ in of_ranks]) for of_ranks in by_step)
        if engine == "ours":
            timelines = [[event for _, events in of_ranks for event in events] for of_ranks in by_step]
            own = statistics.median(timeline.bubble_fraction(events, ranks) for events in timelines)
    ideal = in_theory(name, ranks, microbatches)
    long = sorted(end - began for theirs in gathered for naps, _ in theirs["ours"] for began, end in naps)
    row = Row(name, ranks, microbatches, ideal, limit(name, ranks, microbatches), measured, own, long)
    print(row, flush=True)
    if keep is not None:
        stem = f"{name}-{ranks}x{microbatches}"
        timeline.write(timelines[-1], keep / f"{stem}.json")
        bubble = timeline.bubble_fraction(timelines[-1], ranks)
        picture.write(timelines[-1], keep / f"{stem}.svg", schedule=name, measured=bubble, theoretical=row.theory)
    return row


def set_nap(long: float) -> None:
    global _nap_s
    _nap_s = long
    _naps.clear()


def slept(naps_by_rank: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The part of a step in which ranks did not sleep; see the top of this file."""
    naps = [nap for naps in naps_by_rank for nap in naps]
    window = max(end for _, end in naps) - min(begin for begin, _ in naps)
    return 1 - sum(end - begin for begin, end in naps) / (len(naps_by_rank) * window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 microbatches and one step only")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--realtime", action="store_true", help="the ranks go before all else on this machine; root's")
    parser.add_argument("--keep", type=Path, help="a directory for our last steps' timelines and pictures")
    given = parser.parse_args()
    if given.quick:
        given.microbatches, given.steps = [8], 1
    if min(*given.ranks, *given.microbatches, given.steps) < 1 or min(given.ranks) < 2:
        parser.error("at least 2 ranks, 1 microbatch and 1 step")
    if given.realtime:
        try:  # of this thread; the fork server, its ranks and their threads inherit it
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            parser.error("--realtime is for root (CAP_SYS_NICE); leave it out, and see that the machine is quiet")
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)

    # Side by side as long as there are no more ranks than the largest pipeline has.
    most = max(given.ranks)
    small = [ranks for ranks in given.ranks if ranks != most]
    batches = [[most], small] if sum(small) <= most else [[ranks] for ranks in given.ranks]
    longest = [max((seconds(r, given.microbatches, given.steps) for r in batch), default=0.0) for batch in batches]
    print(
        f"stages that sleep {1000 * NAP_S:.0f} ms forward, {2000 * NAP_S:.0f} ms back; median of {given.steps} steps; "
        f"about {sum(longest):.0f} s and start-up"
    )
    print(LINE.format(*HEAD), flush=True)
    began, rows = time.monotonic(), []
    for batch, expected in zip(batches, longest, strict=True):
        with ThreadPoolExecutor(max(1, len(batch))) as side_by_side:
            worlds = [
                side_by_side.submit(
                    run_world,
                    *(measure, given.microbatches, given.steps, given.keep),
                    sizes=(ranks,),
                    names=("pp",),
                    deadline_seconds=2 * expected + 120,
                )
                for ranks in batch
            ]
            rows += [row for world in worlds for row in world.result()[0]]
    print(f"took {time.monotonic() - began:.0f} s")
    problems = [problem for row in rows if (problem := row.problem())]
    if problems:
        sys.exit("over their limits:\n  " + "\n  ".join(problems))


if __name__ == "__main__":
    main()
