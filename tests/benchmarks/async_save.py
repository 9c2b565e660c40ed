"""How long an async save keeps training waiting, beside a sync one of the same state: about 200 MB, tp_fsdp on 2 x 1.

Each save is taken apart. Its stall is the time inside `Checkpoint.after_step`. What the writing thread then costs the
steps beside it, where ranks and writers share their cores, is told in the detail: it is no stall, and a host with cores
to spare does not have it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.benchmarks.rows import Row
from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.train import run
from workloads.training.checkpoint import Checkpoint

SHAPE = (2, 1)
MODEL = {"dim": 512, "n_layers": 5, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 1408, "vocab_size": 256}
"""16.3 million parameters: with AdamW's two moments, 195 MB in fp32."""
EVERY = 6
WARM_UP = 1
"""The first save makes the process group and the buffers."""
ROUNDS = 3
AT_MOST = 0.1


def measure(ctx: RunContext, config: Config) -> dict[str, list[float]]:
    """On every rank, in seconds: each step, from all ranks' begin; the stalls of saves; and each save's whole time."""
    times: dict[str, list[float]] = {"steps": [], "stalls": [], "whole": []}
    after_step, write, end_step = Checkpoint.after_step, Checkpoint._write, ctx.end_step
    began = time.perf_counter()

    def ended(metrics: Any) -> bool:
        stop = end_step(metrics)
        times["steps"].append(time.perf_counter() - began)
        return stop

    def timed(self: Checkpoint, step: int, *args: Any, **options: Any) -> None:
        nonlocal began
        dist.barrier()  # waiting for a slower rank is no part of the stall
        before = time.perf_counter()
        after_step(self, step, *args, **options)
        if step % EVERY == 0:
            times["stalls"].append(time.perf_counter() - before)
        began = time.perf_counter()

    def written(self: Checkpoint, *args: Any) -> None:
        before = time.perf_counter()
        write(self, *args)
        times["whole"].append(time.perf_counter() - before)

    ctx.end_step = ended  # type: ignore[method-assign]
    with mock.patch.object(Checkpoint, "after_step", timed), mock.patch.object(Checkpoint, "_write", written):
        run(config, ctx)
    return times


def settings(mode: str, rounds: int) -> dict[str, Any]:
    steps = EVERY * (WARM_UP + rounds) + EVERY // 2  # the last save has steps beside it, too
    return {
        "model": MODEL,
        "tp": SHAPE[1],
        "seq_len": 32,
        "global_batch_size": SHAPE[0],
        "steps": steps,
        "eval_windows": 1,
        "sample_tokens": 0,
        "checkpoint": {"mode": mode, "every_steps": EVERY, "every_minutes": None, "keep_last": 1},
    }


def longest_of(ranks: list[dict[str, list[float]]], what: str) -> list[float]:
    return [max(values) for values in zip(*(rank[what] for rank in ranks), strict=True)]


def main(rounds: int = ROUNDS) -> list[Row]:
    stalls, steps, whole = {}, {}, {}
    for mode in ("sync", "async"):
        with tempfile.TemporaryDirectory() as folder:
            config = Config.model_validate(settings(mode, rounds))
            ranks = run_world(measure, config, sizes=SHAPE, run_dir=Path(folder) / "run", deadline_seconds=600)
        stalls[mode] = statistics.median(longest_of(ranks, "stalls")[WARM_UP : WARM_UP + rounds])
        whole[mode] = statistics.median(longest_of(ranks, "whole")[WARM_UP : WARM_UP + rounds])
        steps[mode] = longest_of(ranks, "steps")[EVERY * WARM_UP :]
    undisturbed = statistics.median(steps["sync"])
    slower = (sum(steps["async"]) - len(steps["async"]) * undisturbed) / (rounds + 1)
    detail = (
        f"{stalls['async']:.3f} s against {stalls['sync']:.3f} s; a step takes {undisturbed:.3f} s; beside the writing "
        f"thread ({whole['async']:.2f} s a save) steps take {max(slower, 0.0):.2f} s longer altogether"
    )
    what = "the stall of an async save, 195 MB"
    return [
        Row(what=what, against="a sync one", ratio=stalls["async"] / stalls["sync"], at_most=AT_MOST, detail=detail),
        Row(what=what, against="one step", ratio=stalls["async"] / undisturbed, at_most=1.0, detail=detail),
    ]
